// Streaming copies per instruction set; see stream_copy.hpp. (64-byte AVX-512 stores measured no faster than pairs of
// 32-byte ones, so there is no such kernel.) Whole cache lines of the destination are streamed; the
// unaligned head and tail are stored plainly, because half a line streamed costs a read-modify-write in memory.
#include "pack/stream_copy.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pdxfer::pack {
namespace {

template <CacheLevel level>
void copy_plainly(const Piece* pieces, const Piece* ahead, size_t count) noexcept {
  for (size_t i = 0; i < count; ++i) {
    prefetch<level>(ahead[i].src, ahead[i].bytes);
    std::memcpy(pieces[i].dst, pieces[i].src, pieces[i].bytes);
  }
}

}  // namespace

CopyFn plain_copy(CacheLevel level) noexcept {
  return level == CacheLevel::kFirst ? copy_plainly<CacheLevel::kFirst> : copy_plainly<CacheLevel::kSecond>;
}

#if defined(__x86_64__)
namespace {

constexpr size_t kPair = 2 * kCacheLine;
constexpr size_t kShort = 4 * kCacheLine;  // below this the plain head and tail are most of the work

__attribute__((target("avx2"))) inline void stream_line(std::byte* dst, const std::byte* src) noexcept {
  const auto* from = reinterpret_cast<const __m256i*>(src);
  auto* to = reinterpret_cast<__m256i*>(dst);
  const __m256i a = _mm256_loadu_si256(from), b = _mm256_loadu_si256(from + 1);
  _mm256_stream_si256(to, a);
  _mm256_stream_si256(to + 1, b);
}

template <CacheLevel level>
__attribute__((target("avx2"))) void copy_avx2(const Piece* pieces, const Piece* ahead, size_t count) noexcept {
  for (size_t i = 0; i < count; ++i) {
    const auto [dst, src, bytes] = pieces[i];
    const auto [unused, next, next_bytes] = ahead[i];
    if (bytes < kShort) {
      copy_plainly<level>(pieces + i, ahead + i, 1);
      continue;
    }
    size_t at = (kCacheLine - reinterpret_cast<uintptr_t>(dst) % kCacheLine) % kCacheLine;
    if (at != 0) std::memcpy(dst, src, at);
    const size_t lines_end = bytes - (bytes - at) % kPair;
    size_t soon = 0;  // of `next`, prefetched
    for (; at < lines_end && soon < next_bytes; at += kPair, soon += kPair) {
      prefetch_line<level>(next + soon);
      prefetch_line<level>(next + soon + kCacheLine);
      stream_line(dst + at, src + at);
      stream_line(dst + at + kCacheLine, src + at + kCacheLine);
    }
    for (; at < lines_end; at += kPair) {
      stream_line(dst + at, src + at);
      stream_line(dst + at + kCacheLine, src + at + kCacheLine);
    }
    for (; soon < next_bytes; soon += kCacheLine) prefetch_line<level>(next + soon);
    if (at + kCacheLine <= bytes) {
      stream_line(dst + at, src + at);
      at += kCacheLine;
    }
    if (at != bytes) std::memcpy(dst + at, src + at, bytes - at);
  }
}

}  // namespace

CopyFn streaming_copy(CacheLevel level) noexcept {
  if (!__builtin_cpu_supports("avx2")) return plain_copy(level);
  return level == CacheLevel::kFirst ? copy_avx2<CacheLevel::kFirst> : copy_avx2<CacheLevel::kSecond>;
}

void streaming_fence() noexcept { _mm_sfence(); }

#else

CopyFn streaming_copy(CacheLevel level) noexcept { return plain_copy(level); }
void streaming_fence() noexcept {}

#endif

}  // namespace pdxfer::pack
