// The device code inside this module: what was compiled, by which compiler, and the image for a given GPU. Called by
// pack/device_kernels.cpp when a device is first used, and by doctor; any thread; owns nothing.
#pragma once

#include <cstddef>
#include <span>

namespace pdxfer::pack {

struct DeviceImage {
  int arch;  // 90: SASS for 9.x devices, or PTX for 9.0 and later
  bool ptx;
  const unsigned char* data;  // what cuModuleLoadData takes
  size_t bytes;
};

struct DeviceCode {
  const char* compiler;     // "nvcc" or "nvrtc"; "" when there is no device code
  const char* version;      // of the compiler: "12.9"
  const char* ptx_version;  // ISA of the PTX image: "8.8"
  const char* reason;       // why there is no device code; "" when there is
  std::span<const DeviceImage> images;
};

const DeviceCode& device_code() noexcept;

// What to load on a device of this compute capability: SASS of the same major version and no newer a minor one, else
// the PTX. Null when neither serves it. `images` defaults to those of this module.
const DeviceImage* pick_image(int major, int minor,
                              std::span<const DeviceImage> images = device_code().images) noexcept;

}  // namespace pdxfer::pack
