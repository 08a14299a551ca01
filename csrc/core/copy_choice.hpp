// CopyChoice: which of three ways to copy host memory is the fastest on this machine, learnt from the copies
// themselves. Streaming stores with look-ahead are a third faster than memcpy on some processors and a third slower on
// others, and so is prefetching into the second-level cache in place of the first (docs/design/plan.md); nothing that a
// processor says of itself tells.
//
// One for each kind of copy: a HostCopier has some, asked and told by all its threads (what they overwrite of each
// other's is a sample lost), and so has a stream's Sender.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>

#include "core/prefetch.hpp"

namespace pdxfer {

enum class CopyWay : uint8_t {
  kFirstLevel,   // look-ahead prefetch into the first-level cache, past the others
  kSecondLevel,  // look-ahead prefetch into the second-level cache
  kDirect,       // extent by extent: by memcpy, or by the kernel
};
inline constexpr uint32_t kCopyWays = 3;

inline CacheLevel level_of(CopyWay way) noexcept {
  return way == CopyWay::kSecondLevel ? CacheLevel::kSecond : CacheLevel::kFirst;
}

class CopyChoice {
 public:
  // Samples of fewer bytes are mostly noise, and not counted.
  static constexpr uint64_t kLeastBytes = 32 << 10;

  // For the next slice. Each way has its turns at first; later the slower ones share one in kAgain, as they may have
  // been slow for another reason: pages that had to be made, a processor that was taken away.
  CopyWay next() noexcept {
    const uint32_t turn = turn_.fetch_add(1, std::memory_order_relaxed);
    if (turn < kFirst * kCopyWays) return CopyWay(turn % kCopyWays);
    if (turn % kAgain != 0) return best();
    return CopyWay((static_cast<uint32_t>(best()) + 1 + turn / kAgain % (kCopyWays - 1)) % kCopyWays);
  }

  // The fastest so far; a way that nothing was told of counts as that, so that it is tried.
  CopyWay best() const noexcept {
    uint32_t best = 0;
    for (uint32_t way = 1; way < kCopyWays; ++way)
      if (cost_[way].load(std::memory_order_relaxed) < cost_[best].load(std::memory_order_relaxed)) best = way;
    return CopyWay(best);
  }

  void tell(CopyWay way, uint64_t bytes, uint64_t nanoseconds) noexcept {
    if (bytes < kLeastBytes) return;
    std::atomic<uint64_t>& cost = cost_[static_cast<size_t>(way)];
    const uint64_t old = cost.load(std::memory_order_relaxed);
    const uint64_t sample = std::max<uint64_t>(1, (nanoseconds << 20) / bytes);
    // A copy is held up by many things and sped up by none, so the least counts, and is forgotten slowly.
    cost.store(old == 0 ? sample : std::min(sample, old + old / kForget + 1), std::memory_order_relaxed);
  }

 private:
  // A turn of a slower way takes up to twice as long, so it is rare; a prime, as copies come in patterns.
  static constexpr uint32_t kFirst = 4, kAgain = 251;
  static constexpr uint64_t kForget = 32;

  std::atomic<uint32_t> turn_{0};
  std::array<std::atomic<uint64_t>, kCopyWays> cost_{};  // nanoseconds per MiB; 0: not known yet
};

}  // namespace pdxfer
