// The clauses of the seam on cuda_ipc over the fake driver, whose streams run late and whose kernels are the real ones.
#include "fake_cuda_memory.hpp"
#include "transport/cuda_ipc/cuda_ipc_transport.hpp"

PDXFER_CONFORMANCE([](pdxfer::transport::Context c) { return pdxfer::transport::make_cuda_ipc(std::move(c)); })

static const bool kInstalled = conformance::use_fake_cuda();
