// The eight clauses over rdma with the packed path alone; see test_conformance_rdma.cpp.
#include <cstdlib>

#include "conformance.hpp"
#include "fake_verbs.hpp"
#include "transport/rdma/rdma_transport.hpp"

PDXFER_CONFORMANCE([](pdxfer::transport::Context c) {
  c.rdma.path = pdxfer::RdmaOptions::Path::kPacked;
  if (std::getenv("RDMA_BED") != nullptr) return pdxfer::transport::make_rdma(std::move(c));
  return pdxfer::transport::make_rdma_on(std::move(c), fake::table(), fake::devices(2));
})
