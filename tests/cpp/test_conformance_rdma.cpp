// The eight clauses over rdma: two devices striped. Over the table of fake_verbs.hpp, or, with RDMA_BED in the
// environment (tests/rdma/run sets it), over the devices of this machine.
#include <cstdlib>

#include "conformance.hpp"
#include "fake_verbs.hpp"
#include "transport/rdma/rdma_transport.hpp"

PDXFER_CONFORMANCE([](pdxfer::transport::Context c) {
  if (std::getenv("RDMA_BED") != nullptr) return pdxfer::transport::make_rdma(std::move(c));
  return pdxfer::transport::make_rdma_on(std::move(c), fake::table(), fake::devices(2));
})
