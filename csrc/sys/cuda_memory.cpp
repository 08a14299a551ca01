// See cuda_memory.hpp.
#include "sys/cuda_memory.hpp"

#include <algorithm>
#include <string>

#include "core/log.hpp"

namespace pdxfer::sys {
namespace {

void log_failure(shim::CuResult result, const char* what) noexcept {
  if (result != shim::kCuSuccess) log(LogLevel::kWarning, what);
}

}  // namespace

CudaContext::CudaContext(int ordinal) {
  const shim::CudaLibrary& cuda = shim::cuda();
  if (!cuda.reason.empty()) throw Error(Code::kUnavailable, "no CUDA device can be used: " + cuda.reason);
  if (ordinal < 0 || ordinal >= cuda.device_count)
    throw Error(Code::kUnavailable, "CUDA device " + std::to_string(ordinal) + " does not exist: this process sees " +
                                        std::to_string(cuda.device_count));
  shim::cuda_check(cuda.api.device_get(&device_, ordinal), "cuDeviceGet");
  shim::cuda_check(cuda.api.primary_context_retain(&context_, device_), "cuDevicePrimaryCtxRetain");
}

CudaContext::~CudaContext() {
  log_failure(shim::cuda().api.primary_context_release(device_), "cuDevicePrimaryCtxRelease failed");
}

int CudaContext::attribute(int which) const {
  int value = 0;
  shim::cuda_check(shim::cuda().api.device_get_attribute(&value, which, device_), "cuDeviceGetAttribute");
  return value;
}

CudaScope::CudaScope(const CudaContext& context) {
  shim::cuda_check(shim::cuda().api.context_push(context.get()), "cuCtxPushCurrent");
}

CudaScope::~CudaScope() {
  shim::CuContext popped = nullptr;
  log_failure(shim::cuda().api.context_pop(&popped), "cuCtxPopCurrent failed");
}

CudaMemory::CudaMemory(size_t bytes) {
  // The driver refuses an allocation of nothing; an empty table is no error of ours.
  shim::cuda_check(shim::cuda().api.mem_alloc(&pointer_, std::max<size_t>(bytes, 1)), "cuMemAlloc");
}

CudaMemory::CudaMemory(std::span<const std::byte> from) : CudaMemory(from.size()) {
  if (!from.empty())
    shim::cuda_check(shim::cuda().api.copy_to_device(pointer_, from.data(), from.size()), "cuMemcpyHtoD");
}

CudaMemory::~CudaMemory() { log_failure(shim::cuda().api.mem_free(pointer_), "cuMemFree failed"); }

void CudaMemory::read(std::span<std::byte> to) const {
  if (!to.empty()) shim::cuda_check(shim::cuda().api.copy_to_host(to.data(), pointer_, to.size()), "cuMemcpyDtoH");
}

std::shared_ptr<void> pin_host(int ordinal, std::byte* data, size_t bytes) {
  constexpr unsigned kPortableAndMapped = 1 | 2;
  auto context = std::make_shared<CudaContext>(ordinal);
  const CudaScope scope(*context);
  shim::cuda_check(shim::cuda().api.host_register(data, bytes, kPortableAndMapped), "cuMemHostRegister");
  return {data, [context](void* pointer) {
            try {
              const CudaScope inside(*context);
              log_failure(shim::cuda().api.host_unregister(pointer), "cuMemHostUnregister failed");
            } catch (const Error& error) {
              log(LogLevel::kWarning, error.what());
            }
          }};
}

}  // namespace pdxfer::sys
