// SlotPool: the credits of a staging area. Slots of one size in one piece of memory; whoever holds a slot's number may
// use its bytes, and there are never more holders than slots: what finds none waits, which is the back-pressure.
// One thread. Does not own the memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace pdxfer::transport {

class SlotPool {
 public:
  static constexpr uint32_t kNone = UINT32_MAX;

  SlotPool() = default;
  SlotPool(std::byte* memory, uint64_t slot_bytes, uint32_t slots)
      : memory_(memory), slot_bytes_(slot_bytes), taken_(slots, false) {
    free_.reserve(slots);
    for (uint32_t slot = slots; slot > 0; --slot) free_.push_back(slot - 1);
  }

  // A slot for somebody who holds `held` already, or kNone. The first is given while there is any; a further one only
  // from the fuller half, so that one who gets stuck with many leaves the others theirs.
  uint32_t take(uint32_t held) noexcept {
    if (free_.empty() || (held > 0 && free_.size() * 2 <= taken_.size())) return kNone;
    const uint32_t slot = free_.back();
    free_.pop_back();
    taken_[slot] = true;
    return slot;
  }
  // False when nobody holds it: a number from the other end may be anything.
  bool give(uint32_t slot) noexcept {
    if (slot >= taken_.size() || !taken_[slot]) return false;
    taken_[slot] = false;
    free_.push_back(slot);
    return true;
  }
  std::byte* data(uint32_t slot) const noexcept { return memory_ + slot * slot_bytes_; }
  uint64_t slot_bytes() const noexcept { return slot_bytes_; }
  uint32_t slots() const noexcept { return static_cast<uint32_t>(taken_.size()); }
  uint32_t free() const noexcept { return static_cast<uint32_t>(free_.size()); }

 private:
  std::byte* memory_ = nullptr;
  uint64_t slot_bytes_ = 0;
  std::vector<uint32_t> free_;
  std::vector<bool> taken_;
};

}  // namespace pdxfer::transport
