// The clauses of the seam on cuda_ipc over the fake driver, whose streams run late and whose kernels are the real ones.
#include "conformance.hpp"
#include "fake/fake_cuda.hpp"
#include "pack/device_copier.hpp"
#include "transport/cuda_ipc/cuda_ipc_transport.hpp"

PDXFER_CONFORMANCE([](pdxfer::transport::Context c) { return pdxfer::transport::make_cuda_ipc(std::move(c)); })

static const bool kInstalled = [] {
  fake_cuda::install();
  fake_cuda::set_delay_us(100);
  conformance::memory_kind = {0, [](size_t bytes) { return fake_cuda::allocate(0, bytes); }, &fake_cuda::release};
  conformance::device_copies = [](int ordinal, const pdxfer::DeviceCopyOptions& options) {
    return std::make_unique<pdxfer::pack::DeviceCopier>(ordinal, options);
  };
  return true;
}();
