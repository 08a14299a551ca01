// Starting and finishing scatters; see scatters.hpp.
#include "transport/stream/scatters.hpp"

namespace pdxfer::transport::stream {

uint32_t Scatters::take() noexcept {
  const uint32_t slot = lane_.incoming().take(held_);
  if (slot != SlotPool::kNone) ++held_;
  return slot;
}

void Scatters::give_back(uint32_t slot) noexcept {
  lane_.incoming().give(slot);
  --held_;
}

bool Scatters::open(InboundBatch& batch, int device, bool from_ring) {
  std::string why;
  Status status = from_ring ? lane_.open(device, why) : lane_.open_slots(device, why);
  if (status.ok() && from_ring) status = ring_->pin_incoming(device, why);
  if (status.ok()) return true;
  link_.note(why);
  link_.refuse(*batch.shared, status.code, Refusal::kStaging);
  return false;
}

void Scatters::add(InboundBatch& batch, InboundPlan& plan, const Cursor& cursor, uint64_t bytes, uint32_t slot) {
  ++batch.scatters;
  pieces_.push_back(
      {&batch, &plan, slot, data(slot), false, {plan.places[cursor.pair].device, cursor, bytes, 0, 0, {}}});
}

void Scatters::add_from_ring(InboundBatch& batch, InboundPlan& plan, const Cursor& cursor, uint64_t bytes,
                             uint32_t slot, uint64_t at) {
  ++batch.scatters;
  ring_->hold(slot);
  pieces_.push_back({&batch,
                     &plan,
                     slot,
                     ring_->incoming(slot) + at,
                     true,
                     {plan.places[cursor.pair].device, cursor, bytes, 0, 0, {}}});
}

void Scatters::let_go(uint32_t slot) noexcept {
  if (ring_->let_go(slot)) returned_.push_back(slot);
}

void Scatters::end(const Piece& piece) noexcept {
  if (piece.from_ring)
    let_go(piece.slot);
  else
    give_back(piece.slot);
}

bool Scatters::finished(Piece& piece) {
  // What has not started of a refused plan never does.
  const bool never = piece.plan->sink && piece.work.ticket == 0;
  if (!never && !lane_.over(piece.work)) return false;
  if (!piece.work.status.ok()) {
    lane_.wait(piece.work);
    link_.refuse(*piece.batch->shared, piece.work.status.code, Refusal::kDevice);
  }
  end(piece);
  return true;
}

bool Scatters::progress(std::vector<InboundBatch*>& ended) {
  // All of them are asked to start before the first is asked whether it is over, so that the GPU has the next at hand.
  for (Piece& piece : pieces_) {
    const InboundPlan& plan = *piece.plan;
    if (piece.work.started() || !piece.work.status.ok() || plan.sink) continue;
    lane_.start(piece.work, DeviceForm::kScatter, plan.number, plan.copy, plan.places, piece.data);
    if (piece.work.status.ok() && !piece.work.started()) break;
  }
  const size_t before = pieces_.size();
  while (!pieces_.empty() && finished(pieces_.front())) {
    InboundBatch* const batch = pieces_.front().batch;
    pieces_.pop_front();
    if (--batch->scatters == 0 && batch->ended) ended.push_back(batch);
  }
  return pieces_.size() < before;
}

void Scatters::settle(const InboundPlan* plan) noexcept {
  for (Piece& piece : pieces_)
    if (plan == nullptr || piece.plan == plan) {
      lane_.wait(piece.work);
      piece.work.bytes = piece.work.launched;  // no more of it
    }
  if (plan != nullptr) return;  // the caller made it a sink: progress() drops the rest
  for (const Piece& piece : pieces_) end(piece);
  pieces_.clear();
}

void Scatters::release(const InboundPlan& plan) noexcept { lane_.forget(plan.number); }

}  // namespace pdxfer::transport::stream
