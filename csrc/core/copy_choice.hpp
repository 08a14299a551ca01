// CopyChoice: which of a few ways to copy host memory is the fastest on this machine, learnt from the copies
// themselves. Streaming stores with look-ahead are a third faster than memcpy on some processors and a third slower on
// others, and so is prefetching into the second-level cache in place of the first (docs/design/plan.md); nothing that a
// processor says of itself tells.
//
// One for each kind of copy: HostCopier has two, asked and told by all its threads (what they overwrite of each other's
// is a sample lost), a stream's Sender one.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>

#include "core/prefetch.hpp"

namespace pdxfer {

// Ways, by number.
enum class CopyWay : uint8_t {
  kFirstLevel,   // look-ahead prefetch into the first-level cache, past the others
  kSecondLevel,  // look-ahead prefetch into the second-level cache
  kMemcpy,       // extent by extent
};

inline CacheLevel level_of(CopyWay way) noexcept {
  return way == CopyWay::kSecondLevel ? CacheLevel::kSecond : CacheLevel::kFirst;
}

class CopyChoice {
 public:
  // Samples of fewer bytes are mostly noise: do not tell them.
  static constexpr uint64_t kLeastBytes = 32 << 10;

  // Among the first `ways` of CopyWay, 2 or 3.
  explicit CopyChoice(uint32_t ways) noexcept : ways_(ways) {}

  // For the next slice. Each way has its turns at first; later the slower ones share one in kAgain, as they may have
  // been slow for another reason: pages that had to be made, a processor that was taken away.
  CopyWay next() noexcept {
    const uint32_t turn = turn_.fetch_add(1, std::memory_order_relaxed);
    if (turn < kFirst * ways_) return CopyWay(turn % ways_);
    const auto best = static_cast<uint32_t>(this->best());
    if (turn % kAgain != 0) return CopyWay(best);
    return CopyWay((best + 1 + turn / kAgain % (ways_ - 1)) % ways_);
  }

  // The fastest so far.
  CopyWay best() const noexcept {
    uint32_t best = 0;
    for (uint32_t way = 1; way < ways_; ++way)
      if (cost_[way].load(std::memory_order_relaxed) < cost_[best].load(std::memory_order_relaxed)) best = way;
    return CopyWay(best);
  }

  void tell(CopyWay way, uint64_t bytes, uint64_t nanoseconds) noexcept {
    if (bytes < kLeastBytes) return;
    std::atomic<uint64_t>& cost = cost_[static_cast<size_t>(way)];
    const uint64_t old = cost.load(std::memory_order_relaxed);
    const uint64_t sample = std::max<uint64_t>(1, (nanoseconds << 20) / bytes);
    // What is much faster than thought was; what is slower may have been held up.
    const bool at_once = old == 0 || sample < old / 2;
    const uint64_t bounded = std::min(sample, kMostGrowth * old);
    cost.store(at_once ? sample : (3 * old + bounded + 3) / 4, std::memory_order_relaxed);
  }

 private:
  // A turn of a slower way takes up to twice as long, so it is rare; a prime, as copies come in patterns.
  static constexpr uint32_t kFirst = 4, kAgain = 251;
  static constexpr uint64_t kMostGrowth = 4;

  const uint32_t ways_;
  std::atomic<uint32_t> turn_{0};
  std::array<std::atomic<uint64_t>, 3> cost_{};  // nanoseconds per MiB, moving averages; 0: not known yet
};

}  // namespace pdxfer
