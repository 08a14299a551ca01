// The embedded images; see device_code.hpp. cmake/device_code.py writes the included file: byte arrays kSm80 ... and
// kCode, which describes them.
#include "pack/device_code.hpp"

namespace pdxfer::pack {
namespace {
#ifdef PDXFER_DEVICE_INC
#include PDXFER_DEVICE_INC
#else
constexpr DeviceCode kCode{"", "", "", "compiled without cmake/device_code.cmake", {}};
#endif
}  // namespace

const DeviceCode& device_code() noexcept { return kCode; }

const DeviceImage* pick_image(int major, int minor, std::span<const DeviceImage> images) noexcept {
  const DeviceImage* best = nullptr;
  for (const DeviceImage& image : images) {
    const bool serves =
        image.ptx ? image.arch <= major * 10 + minor : image.arch / 10 == major && image.arch % 10 <= minor;
    if (!serves) continue;
    const bool better =
        best == nullptr || (best->ptx && !image.ptx) || (best->ptx == image.ptx && best->arch < image.arch);
    if (better) best = &image;
  }
  return best;
}

}  // namespace pdxfer::pack
