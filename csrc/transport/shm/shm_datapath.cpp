// The hot half of ShmLink: submit, notify, cancel, take. Worker thread. The lock is held for table look-ups, once per
// chunk, and never while bytes move.
#include <algorithm>
#include <cerrno>

#include "transport/check_copy.hpp"
#include "transport/shm/shm_link.hpp"

namespace pdxfer::transport::shm {
namespace {
constexpr uint64_t kBytesPerCopyThread = 4 << 20;
}  // namespace

// The last word on a batch. Bytes move inside submit only, so whoever polls the completion knows that none is late.
Status ShmLink::finish(BatchId id, Batch& batch, Status status) {
  if (batch.over) return batch.status;
  batch.over = true;
  batch.status = status;
  Completion sent;
  sent.peer = peer_;
  sent.batch = id;
  sent.status = status;
  complete(std::move(sent));
  return status;
}

void ShmLink::complete(Completion completion) {
  ready_.push_back(std::move(completion));
  ready_count_.store(ready_.size(), std::memory_order_release);
  core_->wake();
}

size_t ShmLink::take(std::span<Completion> out) {
  if (ready_count_.load(std::memory_order_acquire) == 0) return 0;
  const std::lock_guard lock(mutex_);
  size_t n = 0;
  for (; n < out.size() && !ready_.empty(); ready_.pop_front()) {
    out[n] = std::move(ready_.front());
    if (out[n].kind == Completion::Kind::kSent) batches_.erase(out[n].batch);
    ++n;
  }
  ready_count_.store(ready_.size(), std::memory_order_release);
  return n;
}

// Where the regions of every pair begin, and by which way all of them can be reached.
Status ShmLink::look_up(const PagedCopy& copy, Prepared& out) {
  out.src.clear();
  out.dst.clear();
  out.way = Way::kMap;
  out.waiting = false;
  for (const RegionPair& p : copy.pairs) {
    const Import& import = imports_.at(p.dst);
    if (!import.refused.ok()) return import.refused;
    out.waiting = out.waiting || import.waiting;
    out.way = std::max(out.way, import.way);
  }
  const std::lock_guard lock(core_->regions_mutex);
  for (const RegionPair& p : copy.pairs) {
    const Import& import = imports_.at(p.dst);
    const auto local = core_->regions.find(p.src);
    if (local == core_->regions.end()) return {Code::kInvalid, 0, "unknown region"};
    out.src.push_back(local->second.buffer.data);
    out.dst.push_back(out.way == Way::kMap ? import.mapped.data : import.region.buffer.data);
  }
  return kOkStatus;
}

Status ShmLink::prepare(Batch& batch, const TransferPlan& plan, uint32_t copy_index, const Cursor& cursor) {
  if (copy_index >= plan.copies.size()) return {Code::kInvalid, 0, "no such copy in the plan"};
  const PagedCopy& copy = plan.copies[copy_index];
  if (!inside(copy, cursor)) return {Code::kInvalid, 0, "cursor outside its copy"};
  if (batch.copies.size() < plan.copies.size()) batch.copies.resize(plan.copies.size());
  Prepared& prepared = batch.copies[copy_index];
  const uint64_t local_generation = core_->generation.load(std::memory_order_acquire);
  if (prepared.local_generation == local_generation && prepared.import_generation == import_generation_)
    return kOkStatus;
  if (prepared.local_generation == 0)
    if (const Status s = check_sealed(copy); !s.ok()) return s;
  const auto imported = [&](RegionId id) {
    const auto found = imports_.find(id);
    return found == imports_.end() ? uint64_t{0} : found->second.region.buffer.bytes;
  };
  if (const Status s = check_range(copy, Side::kDst, imported); !s.ok()) return s;
  const auto local = [&](RegionId id) {
    const std::lock_guard lock(core_->regions_mutex);
    const auto found = core_->regions.find(id);
    return found == core_->regions.end() ? uint64_t{0} : found->second.buffer.bytes;
  };
  if (const Status s = check_range(copy, Side::kSrc, local); !s.ok()) return s;
  if (const Status s = look_up(copy, prepared); !s.ok()) return s;
  // As it was before the look-up: a region deregistered meanwhile makes the next call look again.
  prepared.local_generation = local_generation;
  prepared.import_generation = import_generation_;
  return kOkStatus;
}

Status ShmLink::move(const PagedCopy& copy, Cursor& cursor, const Prepared& prepared) noexcept {
  const Limits& limits = core_->context.limits;
  const uint64_t budget = limits.chunk_bytes;
  if (prepared.way == Way::kMap) {
    // Helpers of the host copy need long steps to be worth waking; the turn takes about as long as one thread's chunk.
    const uint64_t shared = limits.copy_threads > 1 ? limits.copy_threads * kBytesPerCopyThread : 0;
    core_->context.copy(copy, cursor, std::max(budget, shared), prepared.src, prepared.dst);
    return kOkStatus;
  }
  for (uint64_t moved = 0; moved < budget && !at_end(copy, cursor);) {
    uint64_t step = 0;
    const Status s = connection_.cma->write(copy, cursor, budget - moved, prepared.src, prepared.dst, step);
    if (!s.ok()) return s;
    moved += step;
  }
  return kOkStatus;
}

// Whoever waits for a region back may have it now.
void ShmLink::end_copy() {
  copying_ = false;
  ++copies_done_;
  for (const RegionId region : give_back_later_) give_back(region);
  give_back_later_.clear();
  changed_.notify_all();
}

// A whole batch goes one way or the other, so that one end of it acknowledges all of it.
ShmLink::Route ShmLink::choose_route(const TransferPlan& plan) const {
  if (!staged_) return Route::kDirect;
  Route route = Route::kDirect;
  for (const PagedCopy& copy : plan.copies)
    for (const RegionPair& p : copy.pairs) {
      const auto found = imports_.find(p.dst);
      if (found == imports_.end()) return Route::kDirect;  // which refuses it
      if (found->second.waiting) return Route::kUndecided;
      if (found->second.way == Way::kStaging) route = Route::kStaged;
    }
  return route;
}

Status ShmLink::submit(BatchId id, const TransferPlan& plan, uint32_t copy_index, Cursor& cursor) {
  std::unique_lock lock(mutex_);
  Batch& batch = batches_[id];
  if (batch.over) return batch.status;
  if (batch.route == Route::kUndecided && lost_.ok()) {
    batch.route = choose_route(plan);
    if (batch.route == Route::kUndecided) return kOkStatus;
  }
  if (batch.route == Route::kStaged) {
    lock.unlock();
    return staged_->submit(id, plan, copy_index, cursor);
  }
  if (!lost_.ok()) return finish(id, batch, lost_);
  if (copy_index < plan.copies.size() && at_end(plan.copies[copy_index], cursor)) return kOkStatus;
  if (const Status s = prepare(batch, plan, copy_index, cursor); !s.ok()) return finish(id, batch, s);
  const Prepared& prepared = batch.copies[copy_index];
  if (prepared.waiting) return kOkStatus;  // its segments are under way
  copying_ = true;
  lock.unlock();
  const Status status = move(plan.copies[copy_index], cursor, prepared);
  lock.lock();
  end_copy();
  if (status.code == Code::kPeerLost) lose(status);
  return status.ok() ? status : finish(id, batch, status);
}

bool ShmLink::notify(BatchId id, std::optional<uint64_t> tag, ByteView tail) {
  std::unique_lock lock(mutex_);
  Batch& batch = batches_[id];
  if (batch.route == Route::kStaged) {
    lock.unlock();
    return staged_->notify(id, tag, tail);
  }
  if (batch.over || batch.ended) return true;
  if (!lost_.ok()) return finish(id, batch, lost_), true;
  if (tail.size() > core_->context.limits.max_tail_bytes)
    return finish(id, batch, {Code::kInvalid, 0, "tail larger than the limit"}), true;
  const int error = outbox_.offer(local::end_of(Type::kEnd, id, tag), tail);
  if (error == EAGAIN) return false;  // the poll thread wakes the worker when there is room
  if (error != 0) return lose({Code::kPeerLost, error, "sendmsg"}), true;
  batch.ended = true;
  return true;
}

void ShmLink::cancel(BatchId id) {
  std::unique_lock lock(mutex_);
  Batch& batch = batches_[id];
  if (batch.route == Route::kStaged) {
    lock.unlock();
    return staged_->cancel(id);
  }
  // Everything of an ended batch is in place already; its acknowledgement is the answer.
  if (!batch.over && !batch.ended) finish(id, batch, {Code::kCancelled, 0, "cancelled by the sender"});
}

Status ShmLink::lost() const {
  const std::lock_guard lock(mutex_);
  return lost_.ok() && staged_ ? staged_->lost() : lost_;
}

void ShmLink::staged_over(BatchId batch) {
  const std::lock_guard lock(mutex_);
  batches_.erase(batch);
}

}  // namespace pdxfer::transport::shm
