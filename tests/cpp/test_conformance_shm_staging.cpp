// The clauses of the seam on shm through staging rings alone.
#include "conformance.hpp"
#include "transport/shm/shm_transport.hpp"

PDXFER_CONFORMANCE([](pdxfer::transport::Context c) {
  c.shm_path = "staging";
  return pdxfer::transport::make_shm(std::move(c));
})
