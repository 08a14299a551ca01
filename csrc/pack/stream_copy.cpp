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

constexpr size_t kLine = 64;

inline void prefetch_line(const std::byte* at) noexcept { __builtin_prefetch(at, 0, 0); }

}  // namespace

void prefetch(const Piece& piece) noexcept {
  for (size_t at = 0; at < piece.bytes; at += kLine) prefetch_line(piece.src + at);
}

void plain_copy(const Piece* pieces, const Piece* ahead, size_t count) noexcept {
  for (size_t i = 0; i < count; ++i) {
    prefetch(ahead[i]);
    std::memcpy(pieces[i].dst, pieces[i].src, pieces[i].bytes);
  }
}

#if defined(__x86_64__)
namespace {

constexpr size_t kPair = 2 * kLine;
constexpr size_t kShort = 4 * kLine;  // below this the plain head and tail are most of the work

__attribute__((target("avx2"))) inline void stream_line(std::byte* dst, const std::byte* src) noexcept {
  const auto* from = reinterpret_cast<const __m256i*>(src);
  auto* to = reinterpret_cast<__m256i*>(dst);
  const __m256i a = _mm256_loadu_si256(from), b = _mm256_loadu_si256(from + 1);
  _mm256_stream_si256(to, a);
  _mm256_stream_si256(to + 1, b);
}

__attribute__((target("avx2"))) void copy_avx2(const Piece* pieces, const Piece* ahead, size_t count) noexcept {
  for (size_t i = 0; i < count; ++i) {
    const auto [dst, src, bytes] = pieces[i];
    const auto [unused, next, next_bytes] = ahead[i];
    if (bytes < kShort) {
      plain_copy(pieces + i, ahead + i, 1);
      continue;
    }
    size_t at = (kLine - reinterpret_cast<uintptr_t>(dst) % kLine) % kLine;
    if (at != 0) std::memcpy(dst, src, at);
    const size_t lines_end = bytes - (bytes - at) % kPair;
    size_t soon = 0;  // of `next`, prefetched
    for (; at < lines_end && soon < next_bytes; at += kPair, soon += kPair) {
      prefetch_line(next + soon);
      prefetch_line(next + soon + kLine);
      stream_line(dst + at, src + at);
      stream_line(dst + at + kLine, src + at + kLine);
    }
    for (; at < lines_end; at += kPair) {
      stream_line(dst + at, src + at);
      stream_line(dst + at + kLine, src + at + kLine);
    }
    for (; soon < next_bytes; soon += kLine) prefetch_line(next + soon);
    if (at + kLine <= bytes) {
      stream_line(dst + at, src + at);
      at += kLine;
    }
    if (at != bytes) std::memcpy(dst + at, src + at, bytes - at);
  }
}

}  // namespace

CopyFn streaming_copy() noexcept {
  if (__builtin_cpu_supports("avx2")) return copy_avx2;
  return plain_copy;
}

void streaming_fence() noexcept { _mm_sfence(); }

#else

CopyFn streaming_copy() noexcept { return plain_copy; }
void streaming_fence() noexcept {}

#endif

}  // namespace pdxfer::pack
