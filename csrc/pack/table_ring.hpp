// TableRing: where the tables of copies in flight live, in pinned memory and, at the same offsets, on the device. A
// bump allocator over a ring: entries leave in the order they came, once released and no longer used by a piece. An
// empty ring begins again at its start, whose lines the caches still hold.
// Owned by a DeviceCopier, used by its thread; allocates nothing after construction.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/device_copy.hpp"

namespace pdxfer::pack {

class TableRing {
 public:
  static constexpr uint64_t kAlign = 256;
  static constexpr uint64_t kSingle = UINT64_MAX;  // firsts_at of a copy whose runs are single slots
  struct Entry {
    uint64_t begin = 0, bytes = 0;  // in the ring; bytes include what was skipped at its end
    uint64_t last_piece = 0;        // the last ticket that uses it
    bool released = false;
    uint32_t pairs = 0, slots = 0;
    uint64_t pairs_at = 0, firsts_at = 0;    // in the ring, as is `begin`, where the slots are
    bool one_run = false;                    // in pairs without gaps: to the kernels it is one slot
    bool written = false, uploaded = false;  // the slots; slots and pairs
    DeviceForm form = DeviceForm::kPaged;
    bool buffered() const noexcept { return form == DeviceForm::kGather || form == DeviceForm::kScatter; }
  };

  TableRing(uint64_t bytes, size_t entries) : bytes_(bytes / kAlign * kAlign), entries_(entries) {}
  uint64_t bytes() const noexcept { return bytes_; }

  // The name of a new entry of `bytes`; 0: no room now. `done`: pieces up to this ticket are over.
  uint64_t take(uint64_t bytes, uint64_t done) noexcept {
    reclaim(done);
    if (oldest_ == next_) head_ = tail_ = 0;
    const uint64_t want = (bytes + kAlign - 1) / kAlign * kAlign;
    if (next_ - oldest_ == entries_.size() || want > bytes_) return 0;
    const uint64_t at = head_ % bytes_;
    const uint64_t skip = at + want > bytes_ ? bytes_ - at : 0;
    if (head_ + skip + want - tail_ > bytes_) return 0;
    Entry& entry = entries_[next_ % entries_.size()];
    entry = {};
    entry.begin = (head_ + skip) % bytes_;
    entry.bytes = skip + want;
    head_ += skip + want;
    return ++next_;  // names begin at 1
  }
  Entry* find(uint64_t name) noexcept {
    const uint64_t index = name - 1;
    return index < oldest_ || index >= next_ ? nullptr : &entries_[index % entries_.size()];
  }
  void reclaim(uint64_t done) noexcept {
    for (; oldest_ < next_; ++oldest_) {
      const Entry& entry = entries_[oldest_ % entries_.size()];
      if (!entry.released || entry.last_piece > done) return;
      tail_ += entry.bytes;
    }
  }

 private:
  const uint64_t bytes_;
  uint64_t head_ = 0, tail_ = 0;    // grow until the ring is empty
  uint64_t oldest_ = 0, next_ = 0;  // likewise: indices of entries
  std::vector<Entry> entries_;
};

}  // namespace pdxfer::pack
