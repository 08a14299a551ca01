// The clauses of the seam on shm, as it chooses its ways itself; the forced ways are in test_conformance_shm_*.cpp.
#include "conformance.hpp"
#include "transport/shm/shm_transport.hpp"

PDXFER_CONFORMANCE([](pdxfer::transport::Context c) { return pdxfer::transport::make_shm(std::move(c)); })
