// The clauses of the seam on shm with cross-memory attach alone.
#include "conformance.hpp"
#include "transport/shm/shm_transport.hpp"

PDXFER_CONFORMANCE([](pdxfer::transport::Context c) {
  c.shm_path = "cma";
  return pdxfer::transport::make_shm(std::move(c));
})
