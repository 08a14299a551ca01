// See device_kernels.hpp.
#include "pack/device_kernels.hpp"

#include <string>

#include "core/log.hpp"
#include "pack/device_code.hpp"

namespace pdxfer::pack {

DeviceKernels::DeviceKernels(int ordinal) : context_(ordinal) {
  const DeviceCode& code = device_code();
  const int major = context_.attribute(shim::kCuAttributeMajor);
  const int minor = context_.attribute(shim::kCuAttributeMinor);
  const DeviceImage* image = pick_image(major, minor);
  // A driver that brings kernels of its own (tests) is asked for them by name, whatever it is given to load.
  const bool needs_image = shim::cuda().library.present();
  if (needs_image && code.images.empty())
    throw Error(Code::kUnavailable, std::string("this build of pdxfer has no device code: ") + code.reason);
  if (needs_image && image == nullptr)
    throw Error(Code::kUnavailable, "no device code for compute capability " + std::to_string(major) + "." +
                                        std::to_string(minor) + ": pdxfer needs 8.0 or later");
  const sys::CudaScope scope(context_);
  const shim::CudaDriver& api = shim::cuda().api;
  const std::string what = image == nullptr ? "cuModuleLoadData"
                                            : std::string("cuModuleLoadData of ") + (image->ptx ? "PTX " : "sm_") +
                                                  (image->ptx ? code.ptx_version : std::to_string(image->arch)) +
                                                  " built by " + code.compiler + " " + code.version;
  shim::cuda_check(api.module_load_data(&module_, image == nullptr ? nullptr : image->data), what.c_str());
  for (const bool sum : {false, true}) {
    const std::string suffix = sum ? "_sum" : "";
    const auto find = [&](const std::string& name) {
      shim::CuFunction found = nullptr;
      shim::cuda_check(api.module_get_function(&found, module_, (name + suffix).c_str()), "cuModuleGetFunction");
      return found;
    };
    for (unsigned i = 0; i < std::size(copies_[sum]); ++i)
      copies_[sum][i] = find("pdx_paged_copy_" + std::to_string(1u << i));
    inlined_[sum] = find("pdx_paged_copy_16_inline");
  }
}

DeviceKernels::~DeviceKernels() {
  const shim::CudaDriver& api = shim::cuda().api;
  shim::CuContext popped = nullptr;
  if (api.context_push(context_.get()) != shim::kCuSuccess) return;
  if (api.module_unload(module_) != shim::kCuSuccess) log(LogLevel::kWarning, "cuModuleUnload failed");
  api.context_pop(&popped);
}

}  // namespace pdxfer::pack
