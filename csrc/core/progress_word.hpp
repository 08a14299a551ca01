// Has a device's progress (DeviceCopyOptions::progress) come so far? Header-only; any thread.
#pragma once

#include <atomic>
#include <cstdint>

namespace pdxfer {

// Pieces are numbered from 1 on and wrap; far fewer than half of all numbers are under way. What the piece and those
// before it wrote is visible to whoever was told true.
inline bool progress_reached(uint32_t& word, uint32_t piece) noexcept {
  return static_cast<int32_t>(std::atomic_ref(word).load(std::memory_order_acquire) - piece) >= 0;
}

}  // namespace pdxfer
