// EngineChoice: which of a GPU's two ways moves long runs sooner over one link, the copy engine or the kernel, learnt
// from the pieces themselves. What two GPUs have between them (NVLink of some generation, PCIe, a partition of a GPU)
// decides it, and nothing that a driver says tells. One per DeviceCopier, on its thread.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>

namespace pdxfer::pack {

class EngineChoice {
 public:
  enum Way : uint8_t { kKernel, kEngine };
  // Smaller pieces are the kernel's; what they take is mostly their launch.
  static constexpr uint64_t kLeastBytes = 16 << 20;

  // For a piece that both can move. The engine, until it is known to be slower; the way that is not taken has one piece
  // in kAgain, as a link may change and neither is known at first.
  Way next(uint64_t bytes) noexcept {
    if (bytes < kLeastBytes) return kKernel;
    const auto& [kernel, engine] = cost_[size_class(bytes)];
    const bool engine_ahead = kernel == 0 || engine <= kernel + kernel / kMargin;
    return engine_ahead == (++turn_ % kAgain != 0) ? kEngine : kKernel;
  }

  // Of a piece that found nothing else of ours under way, from its launch until it was seen to be over.
  void tell(Way way, uint64_t bytes, uint64_t nanoseconds) noexcept {
    if (bytes < kLeastBytes) return;
    uint64_t& cost = cost_[size_class(bytes)][way];
    const uint64_t sample = std::max<uint64_t>(1, (nanoseconds << 20) / bytes);
    // A piece is held up by many things and sped up by none, so the least counts, and is forgotten slowly.
    cost = cost == 0 ? sample : std::min(sample, cost + cost / kForget + 1);
  }

  // Of the largest pieces that were told of; 0: none was.
  double gbps(Way way) const noexcept {
    for (size_t i = cost_.size(); i-- > 0;)
      if (cost_[i][way] != 0) return static_cast<double>(1 << 20) / static_cast<double>(cost_[i][way]);
    return 0;
  }

 private:
  static constexpr uint64_t kMargin = 32, kForget = 32;
  static constexpr uint32_t kAgain = 251;  // a prime: requests come in patterns

  // Pieces of 16 MiB and more, 32, ..., 256 and more: the launch is less of a larger one.
  static size_t size_class(uint64_t bytes) noexcept {
    return std::min<size_t>(std::bit_width(bytes / kLeastBytes) - 1, 4);
  }

  uint32_t turn_ = 0;
  std::array<std::array<uint64_t, 2>, 5> cost_{};  // nanoseconds per MiB, [size class][way]; 0: not known yet
};

}  // namespace pdxfer::pack
