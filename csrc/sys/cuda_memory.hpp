// RAII over what the CUDA driver lends: a device's primary context, made current for a scope, and device memory.
// Used by pack's device code and its self-test; a context is current to one thread. Owners release and never throw.
#pragma once

#include <cstddef>
#include <memory>
#include <span>

#include "shim/cuda.hpp"

namespace pdxfer::sys {

// The context that torch and the CUDA runtime use too; retained for the object's life.
class CudaContext {
 public:
  explicit CudaContext(int ordinal);  // throws Error(kUnavailable)
  ~CudaContext();
  CudaContext(const CudaContext&) = delete;
  CudaContext& operator=(const CudaContext&) = delete;

  shim::CuDevice device() const noexcept { return device_; }
  shim::CuContext get() const noexcept { return context_; }
  int attribute(int which) const;  // throws Error(kUnavailable)

 private:
  shim::CuDevice device_ = 0;
  shim::CuContext context_ = nullptr;
};

// Makes a context current to this thread, and the one before it again at the end.
class CudaScope {
 public:
  explicit CudaScope(const CudaContext& context);  // throws Error(kUnavailable)
  ~CudaScope();
  CudaScope(const CudaScope&) = delete;
  CudaScope& operator=(const CudaScope&) = delete;
};

// Device memory of the current context.
class CudaMemory {
 public:
  explicit CudaMemory(size_t bytes);                     // throws Error(kUnavailable)
  explicit CudaMemory(std::span<const std::byte> from);  // likewise; with a copy of host memory
  ~CudaMemory();
  CudaMemory(const CudaMemory&) = delete;
  CudaMemory& operator=(const CudaMemory&) = delete;

  shim::CuDevicePtr get() const noexcept { return pointer_; }
  void read(std::span<std::byte> to) const;  // the first to.size() bytes; throws Error(kUnavailable)

 private:
  shim::CuDevicePtr pointer_ = 0;
};

// Makes host memory that is mapped already reachable by every device, at its own address (unified addressing), until
// the result goes; page-locked meanwhile. Any thread. Throws Error(kUnavailable).
std::shared_ptr<void> pin_host(int ordinal, std::byte* data, size_t bytes);

}  // namespace pdxfer::sys
