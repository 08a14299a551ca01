// Starting and finishing gathers; see gathers.hpp.
#include "transport/stream/gathers.hpp"

#include <algorithm>

namespace pdxfer::transport::stream {

void give_up(LinkState& link, Outbound& batch, Status why) {
  int32_t none = 0;
  if (batch.stop.compare_exchange_strong(none, static_cast<int32_t>(why.code)))
    link.post({LinkEvent::Kind::kGivenUp, batch.id, why, {}});
}

bool admit(LinkState& link, const SendItem& item) {
  Outbound& batch = *item.batch;
  if (batch.stop.load(std::memory_order_acquire) != 0) return false;
  if (item.epoch == link.regions.epoch()) return true;
  const PagedCopy& copy = batch.plan->copies[item.copy];
  const bool there =
      std::ranges::all_of(copy.pairs, [&](const RegionPair& p) { return link.regions.find(p.src).data != nullptr; });
  if (!there) give_up(link, batch, kSourceGone);
  return there;
}

void Gathers::fill(SendQueue& queue, bool& hungry) {
  // Behind a piece of host memory nothing is taken: it needs no time beforehand, and the queue is its back-pressure.
  while (count_ < kAhead && (count_ == 0 || at(count_ - 1).item.device != kHost)) {
    Piece& piece = at(count_);
    piece = {};
    if (!queue.pop(piece.item, hungry)) break;
    piece.work.device = piece.item.device;
    piece.work.cursor = piece.item.cursor;
    piece.work.bytes = piece.item.bytes;
    ++count_;
  }
  for (size_t i = 0; i < count_; ++i) {
    Piece& piece = at(i);
    if (piece.item.device != kHost && !piece.dropped && !piece.work.started() && !start(piece)) break;
  }
}

Status Gathers::open(int device) {
  std::string why;
  Status status = ring_ == nullptr ? lane_.open_slots(device, why) : lane_.open(device, why);
  if (status.ok() && ring_ != nullptr) status = ring_->pin_outgoing(device, why);
  if (!status.ok()) link_.note(why);
  return status;
}

// False when there is no room now.
bool Gathers::start(Piece& piece) {
  const SendItem& item = piece.item;
  if (!admit(link_, item)) {
    lane_.wait(piece.work);  // a part of it may have been launched
    return piece.dropped = true;
  }
  if (piece.slot == SlotPool::kNone) {
    if (const Status s = open(item.device); !s.ok()) {
      drop(piece, s);
      return true;
    }
    piece.slot = pool().take(ring_ != nullptr ? 0 : held_);
    if (piece.slot == SlotPool::kNone) return false;
    ++held_;
  }
  const Outbound::CopyState& state = item.batch->copies[item.copy];
  lane_.start(piece.work, DeviceForm::kGather, state.number, item.batch->plan->copies[item.copy], state.places,
              pool().data(piece.slot));
  if (!piece.work.status.ok()) drop(piece, piece.work.status);
  return piece.dropped || piece.work.started();
}

void Gathers::drop(Piece& piece, Status why) noexcept {
  give_up(link_, *piece.item.batch, why);
  lane_.wait(piece.work);  // what was launched before still writes to the slot
  piece.dropped = true;
}

Gathers::Front Gathers::next(SendItem& item, uint32_t& slot) {
  while (count_ > 0) {
    Piece& piece = at(0);
    if (piece.item.device != kHost && !piece.dropped) {
      if (!lane_.over(piece.work)) return Front::kWait;
      if (!piece.work.status.ok()) drop(piece, piece.work.status);
      // Nothing of it was promised yet: a batch given up meanwhile need not send it.
      if (piece.item.batch->stop.load(std::memory_order_acquire) != 0) piece.dropped = true;
    }
    if (piece.dropped && piece.slot != SlotPool::kNone) give_back(piece.slot);
    const bool dropped = piece.dropped;
    item = piece.item;
    slot = dropped ? SlotPool::kNone : piece.slot;
    first_ = (first_ + 1) % kAhead;
    --count_;
    if (!dropped) return Front::kReady;
  }
  return Front::kNone;
}

void Gathers::give_back(uint32_t slot) noexcept {
  if (pool().give(slot)) --held_;
}

void Gathers::lend(uint32_t slot) noexcept {
  ring_->lend(slot);
  --held_;
}

void Gathers::end(const Outbound& batch) noexcept {
  for (const Outbound::CopyState& state : batch.copies)
    if (state.number != 0) lane_.forget(state.number);
}

void Gathers::settle() noexcept {
  for (size_t i = 0; i < count_; ++i) lane_.wait(at(i).work);
}

void Gathers::clear() noexcept {
  settle();
  for (size_t i = 0; i < count_; ++i)
    if (at(i).slot != SlotPool::kNone) give_back(at(i).slot);
  first_ = count_ = 0;
}

bool Gathers::waiting() const noexcept { return count_ > 0 && at(0).item.device != kHost; }

}  // namespace pdxfer::transport::stream
