// Streaming copies per instruction set; see stream_copy.hpp. (64-byte AVX-512 stores measured no faster than pairs of
// 32-byte ones, so there is no such kernel.) Whole cache lines of the destination are streamed; the
// unaligned head and tail are stored plainly, because half a line streamed costs a read-modify-write in memory.
#include "pack/stream_copy.hpp"

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pdxfer::pack {

void plain_copy(std::byte* dst, const std::byte* src, size_t bytes) noexcept { std::memcpy(dst, src, bytes); }

#if defined(__x86_64__)
namespace {

constexpr size_t kLine = 64;
constexpr size_t kShort = 4 * kLine;  // below this the plain head and tail are most of the work

__attribute__((target("avx2"))) void copy_avx2(std::byte* dst, const std::byte* src, size_t bytes) noexcept {
  if (bytes < kShort) return plain_copy(dst, src, bytes);
  const size_t head = (kLine - reinterpret_cast<uintptr_t>(dst) % kLine) % kLine;
  if (head != 0) std::memcpy(dst, src, head);
  size_t at = head;
  for (; at + 2 * kLine <= bytes; at += 2 * kLine) {
    const auto* from = reinterpret_cast<const __m256i*>(src + at);
    auto* to = reinterpret_cast<__m256i*>(dst + at);
    const __m256i a = _mm256_loadu_si256(from), b = _mm256_loadu_si256(from + 1);
    const __m256i c = _mm256_loadu_si256(from + 2), d = _mm256_loadu_si256(from + 3);
    _mm256_stream_si256(to, a);
    _mm256_stream_si256(to + 1, b);
    _mm256_stream_si256(to + 2, c);
    _mm256_stream_si256(to + 3, d);
  }
  if (at != bytes) std::memcpy(dst + at, src + at, bytes - at);
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
