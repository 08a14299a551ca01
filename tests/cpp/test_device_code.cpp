// The device side without a device: image choice, kernel tables, and the kernel itself compiled for the CPU.
// The kernel's threads share nothing and never wait for each other, so running them one after another is faithful.
#include <doctest/doctest.h>

#include <algorithm>
#include <string>

#include "pack/device_code.hpp"
#include "pack/device_selftest.hpp"
#include "pack/paged_copy_device.hpp"

namespace {
struct Index {
  unsigned x;
};
Index threadIdx{}, blockIdx{}, blockDim{pdxfer::kBlockThreads}, gridDim{1};
struct __attribute__((may_alias, aligned(16))) uint4 {
  unsigned x, y, z, w;
};
struct __attribute__((may_alias, aligned(8))) uint2 {
  unsigned x, y;
};
unsigned long long min(unsigned long long a, unsigned long long b) { return std::min(a, b); }
}  // namespace
#define __device__ static inline
#define __global__
#define __launch_bounds__(threads)
#include "pack/paged_copy.cu"

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

TEST_CASE("kernel tables: addresses include offsets, runs carry prefix sums, pieces follow the largest slot") {
  PagedCopy copy;
  copy.pairs = {{1, 2, 10, 20, 100, 200, 50}, {1, 2, 0, 0, 9000, 9000, kPieceBytes + 1}};
  copy.runs = {{5, 6, 3}, {0, 1, 2}};
  copy.seal();
  const uint64_t src[] = {1000, 2000}, dst[] = {3000, 4000};
  const DeviceTables tables = device_tables(copy, src, dst);
  CHECK(tables.pairs[0].src == 1010);
  CHECK(tables.pairs[0].dst == 3020);
  CHECK(tables.runs[1].first == 3);
  CHECK(tables.slots == 5);
  CHECK(tables.pieces == 2);
}

void run_kernel_on_cpu(const PagedCopy& copy, std::span<const std::byte> src, std::span<std::byte> dst,
                       unsigned blocks) {
  if (copy.runs.empty()) return;
  const std::vector<uint64_t> from(copy.pairs.size(), reinterpret_cast<uint64_t>(src.data()));
  const std::vector<uint64_t> to(copy.pairs.size(), reinterpret_cast<uint64_t>(dst.data()));
  const DeviceTables tables = device_tables(copy, from, to);
  const PagedCopyArgs args{tables.pairs.data(),
                           tables.runs.data(),
                           tables.slots,
                           tables.pieces,
                           static_cast<unsigned>(tables.pairs.size()),
                           static_cast<unsigned>(tables.runs.size())};
  gridDim.x = blocks;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < kBlockThreads; ++threadIdx.x) pdx_paged_copy(args);
}

TEST_CASE("the kernel, run by the CPU, moves random copies exactly and touches nothing else") {
  const SelfTestResult result = selftest(20261123, 300, run_kernel_on_cpu);
  CHECK_MESSAGE(result.failure.empty(), result.failure);
  CHECK(result.cases == 300);
  CHECK(result.bytes > 1'000'000);
}

TEST_CASE("a mover that loses one byte is caught") {
  const SelfTestResult result = selftest(7, 300, [](const PagedCopy& copy, auto src, auto dst, unsigned blocks) {
    run_kernel_on_cpu(copy, src, dst, blocks);
    if (copy.bytes > 1000) dst.back() ^= std::byte{1};
  });
  CHECK(!result.failure.empty());
}

}  // namespace pdxfer::pack
