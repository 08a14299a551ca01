// When extents are small, the kernel's copy of each stalls on memory it could not foresee: gathering them here first,
// with look-ahead prefetch into a buffer that stays in cache, and scattering what arrives with stores past the caches,
// is faster although every byte is copied once more. Up to where that pays differs: the kernel writes extents of 4 KiB
// slower, and what it reads as fast depends on the processor (docs/design/wire.md has what was measured). Io threads.
#pragma once

#include <sys/uio.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <span>

#include "core/prefetch.hpp"

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace pdxfer::transport::stream {

inline constexpr size_t kPackBytes = 144 << 10;      // a window and what may follow it; several fit a core's L2 cache
inline constexpr uint64_t kSmallest = 2 << 10;       // mean sizes: below this the hardware foresees nothing
inline constexpr uint64_t kSmallSent = 16 << 10;     // below which a window may be faster gathered
inline constexpr uint64_t kSmallReceived = 8 << 10;  // and below which it is scattered
inline constexpr size_t kFewExtents = 4;             // of which nothing is gained

inline bool worth_packing(uint64_t bytes, size_t extents, uint64_t small) noexcept {
  return extents > kFewExtents && bytes / extents < small;
}

// A window's place, made on first use. On a cache line: a large malloc is 16 bytes past the beginning of a page, and
// there the kernel's copy into it was a quarter slower (docs/design/wire.md).
class PackBuffer {
 public:
  std::byte* data() {
    if (memory_ == nullptr) memory_.reset(new (kAlignment) std::byte[kPackBytes]);
    return memory_.get();
  }

 private:
  static constexpr std::align_val_t kAlignment{kCacheLine};
  struct Delete {
    void operator()(std::byte* memory) const noexcept { ::operator delete[](memory, kAlignment); }
  };
  std::unique_ptr<std::byte, Delete> memory_;
};

// Prefetches extents piece by piece, in order.
template <CacheLevel level>
class Prefetcher {
 public:
  static constexpr size_t kPiece = 1024;
  explicit Prefetcher(std::span<const iovec> extents) noexcept : extents_(extents) {}

  void next() noexcept {
    if (at_ == extents_.size()) return;
    const size_t bytes = std::min(kPiece, extents_[at_].iov_len - done_);
    prefetch<level>(static_cast<const std::byte*>(extents_[at_].iov_base) + done_, bytes);
    done_ += bytes;
    if (done_ == extents_[at_].iov_len) ++at_, done_ = 0;
  }

 private:
  std::span<const iovec> extents_;
  size_t at_ = 0, done_ = 0;
};

// Copies the extents one behind the other, a few KiB behind the prefetch.
template <CacheLevel level>
void gather(std::span<const iovec> extents, std::byte* to) noexcept {
  using Ahead = Prefetcher<level>;
  constexpr int kAhead = 8;  // pieces
  Ahead ahead(extents);
  for (int i = 0; i < kAhead; ++i) ahead.next();
  for (const iovec& extent : extents)
    for (size_t done = 0; done < extent.iov_len;) {
      const size_t bytes = std::min(Ahead::kPiece, extent.iov_len - done);
      ahead.next();
      std::memcpy(to, static_cast<const std::byte*>(extent.iov_base) + done, bytes);
      to += bytes;
      done += bytes;
    }
}

// The same, with all of them prefetched into the second-level cache first, where a window fits: of the smallest extents
// in half the time.
inline void gather_at_once(std::span<const iovec> extents, std::byte* to) noexcept {
  for (const iovec& extent : extents)
    prefetch<CacheLevel::kSecond>(static_cast<const std::byte*>(extent.iov_base), extent.iov_len);
  for (const iovec& extent : extents) {
    std::memcpy(to, extent.iov_base, extent.iov_len);
    to += extent.iov_len;
  }
}

// Of extents that the kernel is to read, but for contiguous ones: it stalls where each begins, and foresees the rest.
inline void prefetch_beginnings(std::span<const iovec> extents) noexcept {
  constexpr size_t kBeginning = 256;
  if (extents.size() <= kFewExtents) return;
  for (const iovec& extent : extents)
    prefetch<CacheLevel::kSecond>(static_cast<const std::byte*>(extent.iov_base), std::min(kBeginning, extent.iov_len));
}

// Copies with stores past the caches, lines that are whole; stream_fence() makes them visible.
inline void stream_copy(std::byte* to, const std::byte* from, size_t bytes) noexcept {
#if defined(__x86_64__)
  const size_t head = (kCacheLine - reinterpret_cast<uintptr_t>(to) % kCacheLine) % kCacheLine;
  if (bytes >= 4 * kCacheLine) {
    std::memcpy(to, from, head);
    size_t at = head;
    for (; at + kCacheLine <= bytes; at += kCacheLine) {
      const auto* source = reinterpret_cast<const __m128i*>(from + at);
      auto* line = reinterpret_cast<__m128i*>(to + at);
      const __m128i a = _mm_loadu_si128(source), b = _mm_loadu_si128(source + 1);
      const __m128i c = _mm_loadu_si128(source + 2), d = _mm_loadu_si128(source + 3);
      _mm_stream_si128(line, a);
      _mm_stream_si128(line + 1, b);
      _mm_stream_si128(line + 2, c);
      _mm_stream_si128(line + 3, d);
    }
    to += at;
    from += at;
    bytes -= at;
  }
#endif
  std::memcpy(to, from, bytes);
}

inline void stream_fence() noexcept {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Writes `bytes` from `from` over the extents, shortens the first that was not filled, returns how many were. What it
// wrote is visible to whoever learns from this thread that it is there.
inline size_t scatter(std::span<iovec> extents, const std::byte* from, uint64_t bytes) noexcept {
  size_t i = 0;
  for (; bytes > 0; ++i) {
    iovec& extent = extents[i];
    const uint64_t step = std::min<uint64_t>(bytes, extent.iov_len);
    stream_copy(static_cast<std::byte*>(extent.iov_base), from, step);
    from += step;
    bytes -= step;
    if (step == extent.iov_len) continue;
    extent.iov_base = static_cast<std::byte*>(extent.iov_base) + step;
    extent.iov_len -= step;
    break;
  }
  stream_fence();
  return i;
}

}  // namespace pdxfer::transport::stream
