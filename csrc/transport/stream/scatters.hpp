// Scatters: payload that one stream has in pinned slots, its own that it received into or those of the other end's
// ring, on its way into device memory. In the order of its arrival; a piece keeps its slot until the GPU is through
// with it. Its io thread only.
#pragma once

#include <deque>
#include <memory>
#include <utility>
#include <vector>

#include "transport/stream/device_lane.hpp"
#include "transport/stream/link_state.hpp"
#include "transport/stream/slot_ring.hpp"

namespace pdxfer::transport::stream {

// A copy of the other end's plan, as the receiving end holds it.
struct InboundPlan {
  explicit InboundPlan(LinkState& owner) : link(owner) {}
  ~InboundPlan() { link.release_plan(reserved); }
  InboundPlan(const InboundPlan&) = delete;
  InboundPlan& operator=(const InboundPlan&) = delete;

  LinkState& link;
  const uint64_t number = next_number();
  PagedCopy copy;  // destination side; the source side is dense, because that is what the stream is
  std::vector<Place> places;
  uint64_t reserved = 0;
  bool sink = false;  // refused: its chunks land nowhere
};

// One stream's part of a batch of the other end.
struct InboundBatch {
  std::shared_ptr<Inbound> shared;
  std::vector<std::pair<uint32_t, std::unique_ptr<InboundPlan>>> plans;  // by copy
  uint64_t received = 0;
  uint32_t scatters = 0;  // under way: its END waits for them
  bool ended = false;     // its END came: no frame may follow
  FrameHeader end;
  Bytes tail;

  InboundPlan* find(uint32_t copy) const noexcept {
    for (const auto& [index, plan] : plans)
      if (index == copy) return plan.get();
    return nullptr;
  }
};

class Scatters {
 public:
  // `ring`: of the link, null without.
  Scatters(LinkState& link, DeviceLane& lane, SlotRing* ring) : link_(link), lane_(lane), ring_(ring) {
    if (ring != nullptr) returned_.reserve(64);
  }

  // Before the first piece of a device: its copies and the slots that they read. False: they cannot be had, and the
  // batch is refused.
  bool open(InboundBatch& batch, int device, bool from_ring);

  // A slot to receive into, or SlotPool::kNone: then try again soon.
  uint32_t take() noexcept;
  void give_back(uint32_t slot) noexcept;
  std::byte* data(uint32_t slot) const noexcept { return lane_.incoming().data(slot); }
  uint64_t slot_bytes() const noexcept { return lane_.slot_bytes(); }

  // The slot's first `bytes` belong at `cursor` of the plan; one device's pairs only. The slot is ours from here on.
  void add(InboundBatch& batch, InboundPlan& plan, const Cursor& cursor, uint64_t bytes, uint32_t slot);
  // Likewise, `at` bytes into a slot of the ring, which the piece holds (SlotRing::hold) until it is over.
  void add_from_ring(InboundBatch& batch, InboundPlan& plan, const Cursor& cursor, uint64_t bytes, uint32_t slot,
                     uint64_t at);
  // Nobody of ours reads the ring's slot any more, as far as the caller is concerned.
  void let_go(uint32_t slot) noexcept;
  // The ring's slots that nobody reads any more: the caller tells the other end, then clears it.
  std::vector<uint32_t>& returned() noexcept { return returned_; }
  // Starts what there is room for and finishes what is over; true when something was. A batch that has none left and
  // has ended is put into `ended`. A piece that failed refuses its batch.
  bool progress(std::vector<InboundBatch*>& ended);
  bool empty() const noexcept { return pieces_.empty(); }
  // Afterwards nothing is written to device memory; what has not started of `plan` (null: at all) is dropped.
  void settle(const InboundPlan* plan) noexcept;
  // The plan's tables are not used any more.
  void release(const InboundPlan& plan) noexcept;

 private:
  struct Piece {
    InboundBatch* batch;
    InboundPlan* plan;
    uint32_t slot;
    std::byte* data;
    bool from_ring;
    DeviceWork work;
  };

  void end(const Piece& piece) noexcept;
  bool finished(Piece& piece);

  LinkState& link_;
  DeviceLane& lane_;
  SlotRing* const ring_;
  std::vector<uint32_t> returned_;
  std::deque<Piece> pieces_;
  uint32_t held_ = 0;  // slots of ours, that of the payload under way included
};

}  // namespace pdxfer::transport::stream
