// See cuda_stream.hpp.
#include "sys/cuda_stream.hpp"

#include "core/log.hpp"

namespace pdxfer::sys {
namespace {
void log_failure(shim::CuResult result, const char* what) noexcept {
  if (result != shim::kCuSuccess) log(LogLevel::kWarning, what);
}
}  // namespace

CudaStream::CudaStream(const CudaContext& context) : context_(context) {
  const CudaScope scope(context);
  const shim::CudaDriver& api = shim::cuda().api;
  int lowest = 0, highest = 0;
  shim::cuda_check(api.context_stream_priorities(&lowest, &highest), "cuCtxGetStreamPriorityRange");
  shim::cuda_check(api.stream_create_with_priority(&stream_, shim::kCuStreamNonBlocking, lowest),
                   "cuStreamCreateWithPriority");
}

CudaStream::~CudaStream() {
  const shim::CudaDriver& api = shim::cuda().api;
  shim::CuContext popped = nullptr;
  if (api.context_push(context_.get()) != shim::kCuSuccess) {
    log(LogLevel::kWarning, "cuCtxPushCurrent failed");
    return;
  }
  log_failure(api.stream_destroy(stream_), "cuStreamDestroy failed");
  log_failure(api.context_pop(&popped), "cuCtxPopCurrent failed");
}

CudaEvent::CudaEvent() {
  shim::cuda_check(shim::cuda().api.event_create(&event_, shim::kCuEventDisableTiming), "cuEventCreate");
}

CudaEvent::~CudaEvent() {
  if (event_ != nullptr) log_failure(shim::cuda().api.event_destroy(event_), "cuEventDestroy failed");
}

PinnedMemory::PinnedMemory(size_t bytes) {
  shim::cuda_check(shim::cuda().api.host_alloc(&pointer_, bytes, shim::kCuHostPortable | shim::kCuHostMapped),
                   "cuMemHostAlloc");
}

PinnedMemory::~PinnedMemory() { log_failure(shim::cuda().api.host_free(pointer_), "cuMemFreeHost failed"); }

}  // namespace pdxfer::sys
