// Loading of the CUDA driver; see cuda.hpp.
#include "shim/cuda.hpp"

#include <atomic>
#include <string>

namespace pdxfer::shim {
namespace {

// Every function has been in the driver since CUDA 11.0, the oldest we serve: one that is missing is a broken library.
// What moves data between processes and devices; the first half of the table is load_table's.
template <typename Want>
void want_data_path(CudaDriver& api, const Want& want) noexcept {
  want(api.device_get_uuid, "cuDeviceGetUuid");
  want(api.context_enable_peer, "cuCtxEnablePeerAccess");
  want(api.context_stream_priorities, "cuCtxGetStreamPriorityRange");
  want(api.stream_create_with_priority, "cuStreamCreateWithPriority");
  want(api.stream_wait_event, "cuStreamWaitEvent");
  want(api.launch_host_function, "cuLaunchHostFunc");
  want(api.event_create, "cuEventCreate");
  want(api.event_destroy, "cuEventDestroy_v2");
  want(api.event_record, "cuEventRecord");
  want(api.event_query, "cuEventQuery");
  want(api.copy_async, "cuMemcpyAsync");
  want(api.copy_to_device_async, "cuMemcpyHtoDAsync_v2");
  want(api.host_alloc, "cuMemHostAlloc");
  want(api.host_free, "cuMemFreeHost");
  want(api.host_register, "cuMemHostRegister_v2");
  want(api.host_unregister, "cuMemHostUnregister");
  want(api.host_device_pointer, "cuMemHostGetDevicePointer_v2");
  want(api.mem_address_range, "cuMemGetAddressRange_v2");
  want(api.ipc_get_handle, "cuIpcGetMemHandle");
  want(api.ipc_open_handle, "cuIpcOpenMemHandle_v2");
  want(api.ipc_close_handle, "cuIpcCloseMemHandle");
  want(api.vmm_retain, "cuMemRetainAllocationHandle");
  want(api.vmm_release, "cuMemRelease");
  want(api.vmm_properties, "cuMemGetAllocationPropertiesFromHandle");
  want(api.vmm_export, "cuMemExportToShareableHandle");
  want(api.vmm_import, "cuMemImportFromShareableHandle");
  want(api.vmm_reserve, "cuMemAddressReserve");
  want(api.vmm_free, "cuMemAddressFree");
  want(api.vmm_map, "cuMemMap");
  want(api.vmm_unmap, "cuMemUnmap");
  want(api.vmm_set_access, "cuMemSetAccess");
}

const char* load_table(DynamicLibrary& lib, CudaDriver& api) noexcept {
  const char* missing = nullptr;
  const auto want = [&](auto& target, const char* symbol) {
    if (!lib.load(target, symbol) && missing == nullptr) missing = symbol;
  };
  want(api.init, "cuInit");
  want(api.driver_get_version, "cuDriverGetVersion");
  want(api.get_error_name, "cuGetErrorName");
  want(api.get_error_string, "cuGetErrorString");
  want(api.device_get_count, "cuDeviceGetCount");
  want(api.device_get, "cuDeviceGet");
  want(api.device_get_name, "cuDeviceGetName");
  want(api.device_get_attribute, "cuDeviceGetAttribute");
  want(api.device_total_mem, "cuDeviceTotalMem_v2");
  want(api.device_can_access_peer, "cuDeviceCanAccessPeer");
  want(api.primary_context_retain, "cuDevicePrimaryCtxRetain");
  want(api.primary_context_release, "cuDevicePrimaryCtxRelease_v2");
  want(api.context_push, "cuCtxPushCurrent_v2");
  want(api.context_pop, "cuCtxPopCurrent_v2");
  want(api.pointer_get_attributes, "cuPointerGetAttributes");
  want(api.module_load_data, "cuModuleLoadData");
  want(api.module_unload, "cuModuleUnload");
  want(api.module_get_function, "cuModuleGetFunction");
  want(api.launch_kernel, "cuLaunchKernel");
  want(api.stream_create, "cuStreamCreate");
  want(api.stream_destroy, "cuStreamDestroy_v2");
  want(api.stream_synchronize, "cuStreamSynchronize");
  want(api.mem_alloc, "cuMemAlloc_v2");
  want(api.mem_free, "cuMemFree_v2");
  want(api.copy_to_device, "cuMemcpyHtoD_v2");
  want(api.copy_to_host, "cuMemcpyDtoH_v2");
  want_data_path(api, want);
  (void)lib.load(api.copy_batch_async, "cuMemcpyBatchAsync");
  (void)lib.load(api.launch_kernel_ex, "cuLaunchKernelEx");
  (void)lib.load(api.mem_range_handle, "cuMemGetHandleForAddressRange");
  (void)lib.load(api.stream_write_value, "cuStreamWriteValue32_v2");
  return missing;
}

std::string error_text(const CudaDriver& api, CuResult result) {
  const char *name = nullptr, *text = nullptr;
  if (api.get_error_name != nullptr) api.get_error_name(result, &name);
  if (api.get_error_string != nullptr) api.get_error_string(result, &text);
  if (name == nullptr) return "CUDA error " + std::to_string(result);
  return std::string(name) + " (" + (text != nullptr ? text : "no text") + ")";
}

CudaLibrary load() {
  CudaLibrary cuda{DynamicLibrary({"libcuda.so.1"}), {}, 0, 0, {}};
  cuda.reason = cuda.library.reason();
  if (!cuda.library.present()) return cuda;
  if (const char* missing = load_table(cuda.library, cuda.api); missing != nullptr) {
    cuda.reason = cuda.library.path() + " has no " + missing + ": pdxfer needs a driver of CUDA 11.0 or later";
    cuda.library.reject(cuda.reason);
    return cuda;
  }
  cuda.api.driver_get_version(&cuda.driver_version);
  CuResult result = cuda.api.init(0);
  if (result == kCuSuccess) result = cuda.api.device_get_count(&cuda.device_count);
  if (result != kCuSuccess)
    cuda.reason = "cuInit: " + error_text(cuda.api, result);
  else if (cuda.device_count == 0)
    cuda.reason = "the driver lists no device (is CUDA_VISIBLE_DEVICES empty?)";
  return cuda;
}

std::atomic<const CudaLibrary*> replaced{nullptr};

}  // namespace

void replace_cuda(const CudaLibrary& replacement) noexcept { replaced.store(&replacement); }

const CudaLibrary& cuda() {
  if (const CudaLibrary* other = replaced.load(std::memory_order_acquire); other != nullptr) return *other;
  // Leaked on purpose: the driver tears itself down at exit, in an order that a destructor here could only disturb.
  static const CudaLibrary* const loaded = new CudaLibrary(load());
  return *loaded;
}

const char* cuda_error_name(CuResult result) noexcept {
  const char* name = nullptr;
  if (cuda().api.get_error_name != nullptr) cuda().api.get_error_name(result, &name);
  return name != nullptr ? name : "CUDA error";
}

std::string cuda_error(CuResult result) { return error_text(cuda().api, result); }

void cuda_check(CuResult result, const char* what) {
  if (result != kCuSuccess)
    throw Error(Code::kUnavailable, std::string(what) + ": " + cuda_error(result), result, cuda_error_name(result));
}

}  // namespace pdxfer::shim
