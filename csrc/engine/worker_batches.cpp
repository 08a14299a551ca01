// The worker's half that moves batches: adoption of peers, submission, progress, completion. Under turn_.
#include <algorithm>

#include "engine/worker.hpp"

namespace pdxfer::engine {

bool Worker::uses(const Batch& batch, Side side, RegionId region) noexcept {
  for (const PagedCopy& copy : batch.plan->copies)
    for (const RegionPair& pair : copy.pairs)
      if ((side == Side::kSrc ? pair.src : pair.dst) == region) return true;
  return false;
}

void Worker::on(Adopt& adopt) {
  PeerState& peer = *adopt.peer;
  peer.last_heard = peer.last_ping = Clock::now();
  peer.set_link_text(peer.link->describe());
  poller_.add(peer.control.fd(), EPOLLIN, &peer);
  peers_.emplace(peer.id, std::move(adopt.peer));
  if (peer.accepted) peer.control.enqueue(FrameType::kSync, {});  // the connecting end waits for it
  publish_to(peer);                                               // what changed between the handshake and now
  control_io(peer, true);                                         // what the peer sent meanwhile
}

// On the caller's thread. False when the worker is awake, or was asked for something before: then it begins the batch.
bool Worker::begin(const std::shared_ptr<Batch>& batch) {
  const std::unique_lock turn(turn_, std::try_to_lock);
  if (!turn) return false;
  {
    const std::lock_guard lock(commands_mutex_);
    if (!commands_.empty()) return false;
  }
  Submit submit{batch};
  on(submit);
  return true;
}

void Worker::on(Submit& submit) {
  const std::shared_ptr<Batch>& batch = submit.batch;
  const auto it = peers_.find(batch->peer);
  if (it == peers_.end() || !it->second->alive()) {
    in_flight_.fetch_sub(1);
    batch->complete({Code::kPeerLost, 0, "the peer was lost before the batch began"});
    return;
  }
  PeerState& peer = *it->second;
  batches_.emplace(batch->id, batch);
  peer.active.push_back(batch);
  // The caller checked too, for an early answer; a region may have gone since.
  Status status = regions_.check(*batch->plan, Side::kSrc);
  if (status.ok()) status = peer.regions.check(*batch->plan, Side::kDst);
  for (const RegionId region : peer.forgetting)
    if (status.ok() && uses(*batch, Side::kDst, region))
      status = {Code::kInvalid, 0, "destination region was withdrawn"};
  if (!status.ok()) return refuse(peer, *batch, status);
  if (!peer.transport->launches()) return;
  while (!batch->done() && peer.alive() && step(peer, *batch)) {  // a GPU that idles costs more than who waits here
  }
}

void Worker::on(Cancel& cancel) {
  const auto it = batches_.find(cancel.batch->id);
  if (it == batches_.end()) return;  // completed already: that answer stands
  refuse(*peers_.at(cancel.batch->peer), *cancel.batch, {Code::kCancelled, 0, "cancelled by its owner"});
}

// Give a batch up: at once when the transport never saw it, else through the transport's fence.
void Worker::refuse(PeerState& peer, Batch& batch, Status why) {
  if (batch.stage == Batch::Stage::kCancelling) return;
  batch.refused = why;
  if (batch.touched) {
    batch.stage = Batch::Stage::kCancelling;
    peer.link->cancel(batch.id);
  } else {
    const std::shared_ptr<Batch> held = batches_.at(batch.id);
    finish(peer, held, why);
  }
}

void Worker::finish(PeerState& peer, const std::shared_ptr<Batch>& batch, Status status) {
  batches_.erase(batch->id);
  std::erase(peer.active, batch);
  if (status.ok()) {
    peer.batches_sent.fetch_add(1, std::memory_order_relaxed);
    peer.bytes_sent.fetch_add(batch->plan->bytes(), std::memory_order_relaxed);
  } else {
    peer.batches_failed.fetch_add(1, std::memory_order_relaxed);
  }
  in_flight_.fetch_sub(1);
  batch->complete(status);
}

bool Worker::throttled(PeerState& peer, uint64_t bytes) {
  peer.fault_bytes += bytes;
  if (faults_.throttle_bytes_per_s != 0) throttle_credit_ -= static_cast<double>(bytes);
  if (faults_.drop_after_bytes != 0 && peer.fault_bytes >= faults_.drop_after_bytes) {
    lose(peer, "cut by Config::fault drop_after");
    return true;
  }
  return false;
}

// One turn of one batch: at most a chunk. True when something moved.
bool Worker::step(PeerState& peer, Batch& batch) {
  if (batch.stage == Batch::Stage::kSubmitting) {
    const auto& copies = batch.plan->copies;
    while (batch.copy_index < copies.size() && at_end(copies[batch.copy_index], batch.cursor)) {
      ++batch.copy_index;
      batch.cursor = {};
    }
    if (batch.copy_index == copies.size()) {
      batch.stage = Batch::Stage::kNotifying;
    } else {
      if (faults_.throttle_bytes_per_s != 0 && throttle_credit_ < 0) return false;
      const PagedCopy& copy = copies[batch.copy_index];
      const Cursor before = batch.cursor;
      batch.touched = true;
      const Status status = peer.link->submit(batch.id, *batch.plan, batch.copy_index, batch.cursor);
      if (!status.ok()) {
        refuse(peer, batch, status);
        return true;
      }
      if (batch.cursor == before) return false;
      const uint64_t rest = std::min(copy.bytes, config_.chunk_bytes);
      return faults_.throttle_bytes_per_s + faults_.drop_after_bytes == 0 || !throttled(peer, rest);
    }
  }
  if (batch.stage == Batch::Stage::kNotifying) {
    batch.touched = true;
    if (!peer.link->notify(batch.id, batch.tag, batch.tail)) return false;
    batch.stage = Batch::Stage::kWaiting;
    return true;
  }
  return false;
}

// Every batch of the peer gets one turn; the first one's place rotates so that none is starved by back-pressure.
bool Worker::progress(PeerState& peer) {
  bool moved = false;
  for (size_t i = 0; i < peer.active.size() && peer.alive();) {
    const std::shared_ptr<Batch> batch = peer.active[i];
    moved |= step(peer, *batch);
    if (i < peer.active.size() && peer.active[i] == batch) ++i;  // else it finished and the next took its place
  }
  if (peer.active.size() > 1) std::rotate(peer.active.begin(), peer.active.begin() + 1, peer.active.end());
  return moved;
}

void Worker::completed(const Completion& completion) {
  const auto it = peers_.find(completion.peer);
  if (completion.kind == Completion::Kind::kArrived) {
    if (it != peers_.end() && completion.status.ok())
      it->second->batches_arrived.fetch_add(1, std::memory_order_relaxed);
    std::lock_guard lock(arrivals_mutex_);
    arrivals_.push_back(completion);
    arrived_.store(arrivals_.size(), std::memory_order_release);
    return;
  }
  const auto found = batches_.find(completion.batch);
  if (it == peers_.end() || found == batches_.end()) return;  // of a peer that was lost meanwhile
  const std::shared_ptr<Batch> batch = found->second;
  Status status = completion.status;
  // A batch given up reports why it was given up, whatever came of it at the other end.
  if (batch->stage == Batch::Stage::kCancelling && (status.ok() || status.code == Code::kCancelled))
    status = batch->refused;
  // Whoever sees the batch fail with its peer must find the peer lost and its link down: lose() then completes it,
  // still in this turn.
  PeerState& peer = *it->second;
  if (status.code == Code::kPeerLost && peer.link && !peer.link->lost().ok()) {
    batch->refused = status;
    return;
  }
  finish(peer, batch, status);
}

}  // namespace pdxfer::engine
