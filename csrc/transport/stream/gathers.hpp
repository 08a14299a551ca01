// Gathers: the pieces that one stream sends next, taken from its queue some way ahead, so that those in device memory
// are gathered into pinned slots while what is before them is written. In the order of the queue. Its io thread only.
#pragma once

#include <array>

#include "transport/stream/device_lane.hpp"
#include "transport/stream/link_state.hpp"
#include "transport/stream/outbound.hpp"
#include "transport/stream/slot_ring.hpp"

namespace pdxfer::transport::stream {

// May this piece still be read? Not when its batch was given up, nor when one of its regions has gone since; the batch
// is then given up.
bool admit(LinkState& link, const SendItem& item);
// The first reason counts. The worker hears of it and ends the batch.
void give_up(LinkState& link, Outbound& batch, Status why);

class Gathers {
 public:
  // `ring`: pieces are gathered into its slots; null: into the lane's.
  Gathers(LinkState& link, DeviceLane& lane, SlotRing* ring) : link_(link), lane_(lane), ring_(ring) {}

  enum class Front : uint8_t { kNone, kWait, kReady };

  // Takes what there is room for from the queue and starts it. `hungry` as SendQueue::pop.
  void fill(SendQueue& queue, bool& hungry);
  // The piece to send next, taken out. kReady with a slot: its bytes are there, and the slot is the caller's to give
  // back; without (SlotPool::kNone): a piece of host memory, or an END. kWait: look again soon.
  Front next(SendItem& item, uint32_t& slot);
  SlotPool& pool() noexcept { return ring_ != nullptr ? ring_->outgoing() : lane_.outgoing(); }
  void give_back(uint32_t slot) noexcept;
  // The other end has the ring's slot now and gives it back to the ring.
  void lend(uint32_t slot) noexcept;
  // The batch's last piece was taken out.
  void end(const Outbound& batch) noexcept;
  // Waits for what is being gathered: afterwards nothing reads device memory until the next fill().
  void settle() noexcept;
  // Likewise, and forgets everything. Slots still with the caller stay there.
  void clear() noexcept;
  // Is there a piece that waits for the GPU or for room, so that nobody but the clock says when to go on?
  bool waiting() const noexcept;
  bool empty() const noexcept { return count_ == 0; }

 private:
  struct Piece {
    SendItem item;
    uint32_t slot = SlotPool::kNone;
    DeviceWork work;
    bool dropped = false;  // its batch was given up
  };
  static constexpr size_t kAhead = 8;

  Piece& at(size_t i) noexcept { return pieces_[(first_ + i) % kAhead]; }
  const Piece& at(size_t i) const noexcept { return pieces_[(first_ + i) % kAhead]; }
  bool start(Piece& piece);
  Status open(int device);
  void drop(Piece& piece, Status why) noexcept;

  LinkState& link_;
  DeviceLane& lane_;
  SlotRing* const ring_;
  std::array<Piece, kAhead> pieces_;
  size_t first_ = 0, count_ = 0;
  uint32_t held_ = 0;  // slots of ours, those with the caller included
};

}  // namespace pdxfer::transport::stream
