// Prefetching what a copy will read, into one cache level or another. A core has only so many lines on their way into
// its first-level cache. Into the second-level one there are twice as many on some processors (Zen 4: random pieces of
// 4 KiB at 12 to 13 GB/s in place of 8); on others it is a little slower (Zen 5). CopyChoice finds out.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pdxfer {

enum class CacheLevel : uint8_t { kFirst, kSecond };

inline constexpr size_t kCacheLine = 64;

// The first level without the others (non-temporal): it costs no more and leaves the model's caches alone.
template <CacheLevel level>
inline void prefetch_line(const std::byte* at) noexcept {
  __builtin_prefetch(at, 0, level == CacheLevel::kFirst ? 0 : 2);
}

template <CacheLevel level>
inline void prefetch(const std::byte* from, size_t bytes) noexcept {
  for (size_t at = 0; at < bytes; at += kCacheLine) prefetch_line<level>(from + at);
}

}  // namespace pdxfer
