// The CUDA driver API as a table of pointers, loaded from libcuda.so.1 on first use; with the few declarations that we
// use, so that building needs no CUDA header and running needs no CUDA. Called from any thread; owns the library's
// handle for the life of the process. Names and meanings are the driver's (CUDA Driver API reference).
#pragma once

#include <cstddef>
#include <string>

#include "core/status.hpp"
#include "shim/dynamic_library.hpp"

namespace pdxfer::shim {

// Values and handles of the driver's ABI, which NVIDIA keeps stable for each versioned symbol (_v2).
using CuResult = int;
using CuDevice = int;
using CuDevicePtr = unsigned long long;
struct CuContextTag;
struct CuModuleTag;
struct CuFunctionTag;
struct CuStreamTag;
struct CuEventTag;
using CuContext = CuContextTag*;
using CuModule = CuModuleTag*;
using CuFunction = CuFunctionTag*;
using CuStream = CuStreamTag*;
using CuEvent = CuEventTag*;
using CuMemHandle = unsigned long long;  // of cuMemCreate

struct CuUuid {
  char bytes[16];
};
struct CuIpcHandle {
  char bytes[64];
};
struct CuMemLocation {
  int type;  // kCuLocationDevice
  int id;
};
struct CuMemAccess {
  CuMemLocation location;
  int flags;  // kCuAccessReadWrite
};
struct CuMemProperties {  // CUmemAllocationProp
  int type;               // 1: pinned
  int handle_types;       // bits: kCuHandlePosixFd
  CuMemLocation location;
  void* win32;
  unsigned char flags[8];
};
struct CuCopyAttributes {  // CUmemcpyAttributes
  int source_order;        // kCuSourceStream: the source is read in stream order
  CuMemLocation from, to;  // hints, for managed memory
  unsigned flags;          // kCuCopyOverlap
};
struct CuLaunchAttribute {
  int id;  // kCuLaunchCluster: x, y, z
  int reserved;
  unsigned value[16];
};
struct CuLaunch {  // CUlaunchConfig
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
  CuStream stream;
  CuLaunchAttribute* attributes;
  unsigned attribute_count;
};
static_assert(sizeof(CuMemProperties) == 32 && sizeof(CuMemAccess) == 12 && sizeof(CuCopyAttributes) == 24 &&
              sizeof(CuLaunchAttribute) == 72 && sizeof(CuLaunch) == 56);

inline constexpr CuResult kCuSuccess = 0;
inline constexpr CuResult kCuInvalidValue = 1;
inline constexpr CuResult kCuNotReady = 600;
inline constexpr CuResult kCuPeerAlreadyEnabled = 704;
inline constexpr CuResult kCuNotSupported = 801;
inline constexpr int kCuLocationDevice = 1;
inline constexpr int kCuHandlePosixFd = 1;
inline constexpr int kCuAccessReadWrite = 3;
inline constexpr int kCuRangeHandleDmaBuf = 1;
inline constexpr unsigned kCuStreamNonBlocking = 1;
inline constexpr unsigned kCuEventDisableTiming = 2;
inline constexpr unsigned kCuIpcLazyPeerAccess = 1;
inline constexpr unsigned kCuHostPortable = 1, kCuHostMapped = 2;
inline constexpr int kCuSourceStream = 1;
inline constexpr unsigned kCuCopyOverlap = 1;  // leave the multiprocessors to others
inline constexpr int kCuLaunchCluster = 4;
inline constexpr int kCuAttributeMultiprocessors = 16;
inline constexpr int kCuAttributePciBus = 33;
inline constexpr int kCuAttributePciDevice = 34;
inline constexpr int kCuAttributePciDomain = 50;
inline constexpr int kCuAttributeMajor = 75;
inline constexpr int kCuAttributeMinor = 76;
inline constexpr int kCuPointerAttributeMemoryType = 2;     // unsigned: 1 host, 2 device, 3 array, 4 unified
inline constexpr int kCuPointerAttributeDeviceOrdinal = 9;  // int

struct CudaDriver {
  CuResult (*init)(unsigned flags);
  CuResult (*driver_get_version)(int* version);
  CuResult (*get_error_name)(CuResult error, const char** name);
  CuResult (*get_error_string)(CuResult error, const char** text);
  CuResult (*device_get_count)(int* count);
  CuResult (*device_get)(CuDevice* device, int ordinal);
  CuResult (*device_get_name)(char* name, int bytes, CuDevice device);
  CuResult (*device_get_attribute)(int* value, int attribute, CuDevice device);
  CuResult (*device_total_mem)(size_t* bytes, CuDevice device);
  CuResult (*device_can_access_peer)(int* can, CuDevice device, CuDevice peer);
  CuResult (*primary_context_retain)(CuContext* context, CuDevice device);
  CuResult (*primary_context_release)(CuDevice device);
  CuResult (*context_push)(CuContext context);
  CuResult (*context_pop)(CuContext* context);
  CuResult (*pointer_get_attributes)(unsigned count, int* attributes, void** values, CuDevicePtr pointer);
  CuResult (*module_load_data)(CuModule* module, const void* image);
  CuResult (*module_unload)(CuModule module);
  CuResult (*module_get_function)(CuFunction* function, CuModule module, const char* name);
  CuResult (*launch_kernel)(CuFunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                            unsigned block_y, unsigned block_z, unsigned shared_bytes, CuStream stream,
                            void** parameters, void** extra);
  CuResult (*stream_create)(CuStream* stream, unsigned flags);
  CuResult (*stream_destroy)(CuStream stream);
  CuResult (*stream_synchronize)(CuStream stream);
  CuResult (*mem_alloc)(CuDevicePtr* pointer, size_t bytes);
  CuResult (*mem_free)(CuDevicePtr pointer);
  CuResult (*copy_to_device)(CuDevicePtr to, const void* from, size_t bytes);
  CuResult (*copy_to_host)(void* to, CuDevicePtr from, size_t bytes);
  CuResult (*device_get_uuid)(CuUuid* uuid, CuDevice device);
  CuResult (*context_enable_peer)(CuContext peer, unsigned flags);
  CuResult (*context_stream_priorities)(int* lowest, int* highest);
  CuResult (*stream_create_with_priority)(CuStream* stream, unsigned flags, int priority);
  CuResult (*stream_wait_event)(CuStream stream, CuEvent event, unsigned flags);
  CuResult (*launch_host_function)(CuStream stream, void (*function)(void*), void* argument);
  CuResult (*event_create)(CuEvent* event, unsigned flags);
  CuResult (*event_destroy)(CuEvent event);
  CuResult (*event_record)(CuEvent event, CuStream stream);
  CuResult (*event_query)(CuEvent event);
  CuResult (*copy_async)(CuDevicePtr to, CuDevicePtr from, size_t bytes, CuStream stream);  // any two kinds of memory
  CuResult (*copy_to_device_async)(CuDevicePtr to, const void* from, size_t bytes, CuStream stream);
  CuResult (*host_alloc)(void** pointer, size_t bytes, unsigned flags);
  CuResult (*host_free)(void* pointer);
  CuResult (*host_register)(void* pointer, size_t bytes, unsigned flags);
  CuResult (*host_unregister)(void* pointer);
  CuResult (*host_device_pointer)(CuDevicePtr* device, void* host, unsigned flags);
  CuResult (*mem_address_range)(CuDevicePtr* base, size_t* bytes, CuDevicePtr pointer);
  CuResult (*ipc_get_handle)(CuIpcHandle* handle, CuDevicePtr pointer);
  CuResult (*ipc_open_handle)(CuDevicePtr* pointer, CuIpcHandle handle, unsigned flags);
  CuResult (*ipc_close_handle)(CuDevicePtr pointer);
  CuResult (*vmm_retain)(CuMemHandle* handle, void* address);
  CuResult (*vmm_release)(CuMemHandle handle);
  CuResult (*vmm_properties)(CuMemProperties* properties, CuMemHandle handle);
  CuResult (*vmm_export)(void* shareable, CuMemHandle handle, int handle_type, unsigned long long flags);
  CuResult (*vmm_import)(CuMemHandle* handle, void* shareable, int handle_type);
  CuResult (*vmm_reserve)(CuDevicePtr* pointer, size_t bytes, size_t alignment, CuDevicePtr wanted,
                          unsigned long long flags);
  CuResult (*vmm_free)(CuDevicePtr pointer, size_t bytes);
  CuResult (*vmm_map)(CuDevicePtr pointer, size_t bytes, size_t offset, CuMemHandle handle, unsigned long long flags);
  CuResult (*vmm_unmap)(CuDevicePtr pointer, size_t bytes);
  CuResult (*vmm_set_access)(CuDevicePtr pointer, size_t bytes, const CuMemAccess* access, size_t count);
  // Null where the driver is older than CUDA 12.8, 11.8, and, the others, 11.7.
  CuResult (*copy_batch_async)(CuDevicePtr* to, CuDevicePtr* from, size_t* bytes, size_t count,
                               CuCopyAttributes* attributes, size_t* first_of_each, size_t attribute_count,
                               size_t* refused, CuStream stream);
  CuResult (*launch_kernel_ex)(const CuLaunch* launch, CuFunction function, void** parameters, void** extra);
  CuResult (*mem_range_handle)(void* handle, CuDevicePtr pointer, size_t bytes, int type, unsigned long long flags);
  CuResult (*stream_write_value)(CuStream stream, CuDevicePtr to, unsigned value, unsigned flags);
};

struct CudaLibrary {
  DynamicLibrary library;
  CudaDriver api{};
  int driver_version = 0;  // 13000 for 13.0: the newest CUDA that this driver serves
  int device_count = 0;
  std::string reason;  // why no device can be used; empty when one can
};

// Loads and initialises on the first call; later calls are a pointer. Never throws for what the machine lacks.
const CudaLibrary& cuda();
// Tests: this table in place of the driver's, for the whole process, before anything asks for it. It lives for ever.
void replace_cuda(const CudaLibrary& replacement) noexcept;

// "CUDA_ERROR_INVALID_VALUE (invalid argument)".
std::string cuda_error(CuResult result);
// "CUDA_ERROR_INVALID_VALUE": the driver's own static string. Never nullptr, allocates nothing.
const char* cuda_error_name(CuResult result) noexcept;
// Throws Error(kUnavailable) "what: CUDA_ERROR_...".
void cuda_check(CuResult result, const char* what);

}  // namespace pdxfer::shim
