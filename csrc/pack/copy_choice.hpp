// CopyChoice: which of two ways copies long extents faster on this machine, learnt from the copies themselves.
// Streaming stores with look-ahead are a third faster than memcpy on some processors and a third slower on others
// (docs/design/plan.md), and nothing that a processor says of itself tells.
//
// One per HostCopier, asked and told by all its threads; what they overwrite of each other's is a sample lost.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace pdxfer::pack {

class CopyChoice {
 public:
  // Samples of fewer bytes are mostly noise: do not tell them.
  static constexpr uint64_t kLeastBytes = 128 << 10;

  // For the next slice. Each way has its turns at first; later the slower one has one in kAgain, as it may have been
  // slow for another reason: pages that had to be made, a processor that was taken away.
  bool streaming() noexcept {
    const uint32_t turn = turn_.fetch_add(1, std::memory_order_relaxed);
    if (turn < kFirst) return turn % 2 == 0;
    const bool faster = cost_[1].load(std::memory_order_relaxed) <= cost_[0].load(std::memory_order_relaxed);
    return turn % kAgain == 0 ? !faster : faster;
  }

  void tell(bool streaming, uint64_t bytes, uint64_t nanoseconds) noexcept {
    std::atomic<uint64_t>& cost = cost_[streaming ? 1 : 0];
    const uint64_t old = cost.load(std::memory_order_relaxed);
    const uint64_t sample = std::max<uint64_t>(1, (nanoseconds << 20) / bytes);
    // What is much faster than thought was; what is slower may have been held up.
    const bool at_once = old == 0 || sample < old / 2;
    const uint64_t bounded = std::min(sample, kMostGrowth * old);
    cost.store(at_once ? sample : (3 * old + bounded + 3) / 4, std::memory_order_relaxed);
  }

 private:
  // A turn of the slower way takes up to twice as long, so it is rare; a prime, as copies come in patterns.
  static constexpr uint32_t kFirst = 8, kAgain = 251;
  static constexpr uint64_t kMostGrowth = 4;

  std::atomic<uint32_t> turn_{0};
  std::atomic<uint64_t> cost_[2]{};  // nanoseconds per MiB, moving averages: memcpy, streaming; 0: not known yet
};

}  // namespace pdxfer::pack
