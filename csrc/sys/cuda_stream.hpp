// RAII over what a device's work runs on: a stream, an event, pinned host memory. Made with the context current (see
// CudaScope), used by the thread that owns the device's work; destructors make the context current themselves.
#pragma once

#include <cstddef>

#include "sys/cuda_memory.hpp"

namespace pdxfer::sys {

// Of the lowest priority, so that it yields to the model's streams, and not ordered with the legacy stream.
class CudaStream {
 public:
  explicit CudaStream(const CudaContext& context);  // throws Error(kUnavailable)
  ~CudaStream();
  CudaStream(const CudaStream&) = delete;
  CudaStream& operator=(const CudaStream&) = delete;
  shim::CuStream get() const noexcept { return stream_; }

 private:
  const CudaContext& context_;
  shim::CuStream stream_ = nullptr;
};

class CudaEvent {
 public:
  CudaEvent();  // throws Error(kUnavailable); without timing
  ~CudaEvent();
  CudaEvent(CudaEvent&& other) noexcept : event_(other.event_) { other.event_ = nullptr; }
  CudaEvent& operator=(CudaEvent&&) = delete;
  shim::CuEvent get() const noexcept { return event_; }

 private:
  shim::CuEvent event_ = nullptr;
};

// Page-locked, mapped into every device; its device address is its own (unified addressing).
class PinnedMemory {
 public:
  explicit PinnedMemory(size_t bytes);  // throws Error(kUnavailable)
  ~PinnedMemory();
  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;
  std::byte* data() const noexcept { return static_cast<std::byte*>(pointer_); }

 private:
  void* pointer_ = nullptr;
};

}  // namespace pdxfer::sys
