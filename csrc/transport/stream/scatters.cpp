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

void Scatters::add(InboundBatch& batch, InboundPlan& plan, const Cursor& cursor, uint64_t bytes, uint32_t slot) {
  ++batch.scatters;
  pieces_.push_back({&batch, &plan, slot, {plan.places[cursor.pair].device, cursor, bytes, 0, 0, {}}});
}

bool Scatters::finished(Piece& piece) {
  // What has not started of a refused plan never does.
  const bool never = piece.plan->sink && piece.work.ticket == 0;
  if (!never && !lane_.over(piece.work)) return false;
  if (!piece.work.status.ok()) {
    lane_.wait(piece.work);
    link_.refuse(*piece.batch->shared, piece.work.status.code, Refusal::kDevice);
  }
  give_back(piece.slot);
  return true;
}

void Scatters::progress(std::vector<InboundBatch*>& ended) {
  // All of them are asked to start before the first is asked whether it is over, so that the GPU has the next at hand.
  for (Piece& piece : pieces_) {
    const InboundPlan& plan = *piece.plan;
    if (piece.work.started() || !piece.work.status.ok() || plan.sink) continue;
    lane_.start(piece.work, DeviceForm::kScatter, plan.number, plan.copy, plan.places, data(piece.slot));
    if (piece.work.status.ok() && !piece.work.started()) break;
  }
  while (!pieces_.empty() && finished(pieces_.front())) {
    InboundBatch* const batch = pieces_.front().batch;
    pieces_.pop_front();
    if (--batch->scatters == 0 && batch->ended) ended.push_back(batch);
  }
}

void Scatters::settle(const InboundPlan* plan) noexcept {
  for (Piece& piece : pieces_)
    if (plan == nullptr || piece.plan == plan) {
      lane_.wait(piece.work);
      piece.work.bytes = piece.work.launched;  // no more of it
    }
  if (plan != nullptr) return;  // the caller made it a sink: progress() drops the rest
  for (const Piece& piece : pieces_) give_back(piece.slot);
  pieces_.clear();
}

void Scatters::release(const InboundPlan& plan) noexcept { lane_.forget(plan.number); }

}  // namespace pdxfer::transport::stream
