// DeviceKernels: the module of pdx_paged_copy kernels loaded into one device's primary context. Made and used by
// pack/device_copier.cpp on the thread that owns the device's work; unloads at the end.
#pragma once

#include "sys/cuda_memory.hpp"

namespace pdxfer::pack {

class DeviceKernels {
 public:
  // Throws Error(kUnavailable): no driver, no such device, no image that serves it.
  explicit DeviceKernels(int ordinal);
  ~DeviceKernels();
  DeviceKernels(const DeviceKernels&) = delete;
  DeviceKernels& operator=(const DeviceKernels&) = delete;

  const sys::CudaContext& context() const noexcept { return context_; }
  // For words of 1, 2, 4, 8 or 16 bytes, given as the power of two. `sum`: with their checksum.
  shim::CuFunction copy(unsigned log2_bytes, bool sum) const noexcept { return copies_[sum][log2_bytes]; }
  // For words of 16 bytes, with PagedCopyInlineArgs.
  shim::CuFunction copy_inlined(bool sum) const noexcept { return inlined_[sum]; }

 private:
  sys::CudaContext context_;
  shim::CuModule module_ = nullptr;
  shim::CuFunction copies_[2][5] = {}, inlined_[2] = {};  // without sums, with them
};

}  // namespace pdxfer::pack
