// The device side without a device: image choice, and that the self-test can fail. test_device_copier.cpp runs the
// kernels themselves on the CPU.
#include <doctest/doctest.h>

#include <cstring>
#include <string>

#include "core/paged_copy.hpp"
#include "pack/device_code.hpp"
#include "pack/device_selftest.hpp"

namespace pdxfer::pack {

TEST_CASE("an image is SASS of the device's major version, else PTX, else none") {
  static const unsigned char data[1] = {};
  const DeviceImage images[] = {{80, false, data, 1}, {90, false, data, 1}, {100, false, data, 1}, {80, true, data, 1}};
  const auto pick = [&](int major, int minor) -> std::string {
    const DeviceImage* image = pick_image(major, minor, images);
    return image == nullptr ? "none" : (image->ptx ? "ptx" : "sm") + std::to_string(image->arch);
  };
  CHECK(pick(7, 5) == "none");
  CHECK(pick(8, 0) == "sm80");
  CHECK(pick(8, 9) == "sm80");
  CHECK(pick(9, 0) == "sm90");
  CHECK(pick(10, 3) == "sm100");
  CHECK(pick(11, 0) == "ptx80");
  CHECK(pick(12, 1) == "ptx80");
  CHECK(pick_image(9, 0, {}) == nullptr);
}

TEST_CASE("a build has images, or says why not") {
  const DeviceCode& code = device_code();
  CHECK(code.images.empty() == (*code.reason != '\0'));
  CHECK(code.images.empty() == (*code.compiler == '\0'));
}

TEST_CASE("a mover that loses one byte is caught") {
  const SelfTestResult result = selftest(7, 300, [](const PagedCopy& copy, auto src, auto dst, unsigned) {
    for (Cursor at; !at_end(copy, at);) {
      const Extent e = next_extent(copy, at, UINT64_MAX);
      std::memcpy(dst.data() + e.dst_offset, src.data() + e.src_offset, e.bytes);
    }
    if (copy.bytes > 1000) dst.back() ^= std::byte{1};
  });
  CHECK(!result.failure.empty());
}

}  // namespace pdxfer::pack
