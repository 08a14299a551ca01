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
using CuContext = CuContextTag*;
using CuModule = CuModuleTag*;
using CuFunction = CuFunctionTag*;
using CuStream = CuStreamTag*;

inline constexpr CuResult kCuSuccess = 0;
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

// "CUDA_ERROR_INVALID_VALUE (invalid argument)".
std::string cuda_error(CuResult result);
// Throws Error(kUnavailable) "what: CUDA_ERROR_...".
void cuda_check(CuResult result, const char* what);

}  // namespace pdxfer::shim
