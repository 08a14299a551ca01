// The conformance suite over the fake CUDA driver: its regions are a fake device's memory, copies are made by the real
// DeviceCopier, and pinning goes through the driver's table. For test files of transports that move device memory.
#pragma once

#include "conformance.hpp"
#include "fake/fake_cuda.hpp"
#include "pack/device_copier.hpp"
#include "sys/cuda_memory.hpp"

namespace conformance {

inline MemoryKind fake_device_memory() {
  return {0, [](size_t bytes) { return fake_cuda::allocate(0, bytes); }, &fake_cuda::release};
}

inline bool use_fake_cuda() {
  fake_cuda::install();
  fake_cuda::set_delay_us(100);
  memory_kind = fake_device_memory();
  device_copies = [](int ordinal, const DeviceCopyOptions& options) {
    return std::make_unique<pack::DeviceCopier>(ordinal, options);
  };
  pin = &sys::pin_host;
  return true;
}

}  // namespace conformance
