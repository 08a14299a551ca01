// Random copies through the device kernel, against the host's walk of the same copy. Called by tests/gpu, by a user who
// suspects a GPU (`_core.device_paged_copy_selftest`) and, with the kernel run by the CPU, by
// tests/cpp/test_device_code; on the caller's thread; owns nothing after it returned.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>

#include "core/types.hpp"

namespace pdxfer::pack {

struct SelfTestResult {
  uint32_t cases = 0;
  uint64_t bytes = 0;   // payload moved and compared
  std::string failure;  // empty: all equal; else the first case that differed, with its shape
};

// Moves a copy whose pairs all begin at src and dst, with this many thread blocks.
using Mover = std::function<void(const PagedCopy& copy, std::span<const std::byte> src, std::span<std::byte> dst,
                                 unsigned blocks)>;
// Random copies through any mover: the whole destination is compared, so a byte beside the slots counts too.
SelfTestResult selftest(uint64_t seed, uint32_t cases, const Mover& move);

// The same through the kernel on a device. Throws Error(kUnavailable) when the device cannot be used.
SelfTestResult device_selftest(int ordinal, uint64_t seed, uint32_t cases);

}  // namespace pdxfer::pack
