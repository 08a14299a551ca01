// The hot half of CudaLink: submit, notify, cancel, take. Worker thread, under the link's lock; a launch takes some ten
// microseconds and nothing waits for the device.
#include <algorithm>
#include <cerrno>
#include <utility>

#include "transport/check_copy.hpp"
#include "transport/cuda_ipc/cuda_ipc_link.hpp"

namespace pdxfer::transport::cuda_ipc {
namespace {
// Pieces in flight at most: what a cancel may have to wait for, and what the next batch stands behind.
constexpr uint64_t kPiecesInFlight = 8;
// How long a receiver that looks at the progress may take to answer.
constexpr auto kAnswerTime = std::chrono::microseconds(20);
}  // namespace

bool CudaLink::over(DeviceTicket ticket) {
  if (ticket <= done_ || !copier_) return true;
  bool is_over = false;
  if (const Status s = copier_->done(ticket, is_over); !s.ok()) {
    device_failed(s);
    return true;
  }
  if (is_over) {
    done_ = std::max(done_, ticket);
    tell_landed();
  }
  return is_over;
}

// Where a copy goes, for the receiver to check it by: after its first launch, while its bytes are on their way.
void CudaLink::announce(BatchId id, const PagedCopy& copy, uint32_t copy_index) {
  Header part;
  part.type = Type::kPlan;
  part.batch = id;
  part.region = copy_index;
  part.tag = copy.pairs.size() | copy.runs.size() << 32;
  const Bytes wire = encode_destination(copy);
  for (size_t at = 0; lost_.ok() && at < wire.size(); at += kPlanPart) {
    const ByteView body = ByteView(wire).subspan(at, std::min(kPlanPart, wire.size() - at));
    if (const Status s = outbox_.post(part, body); !s.ok()) lose(s);
  }
}

// Tells the receiver, which reads it meanwhile, what is in place, and adds up the pieces that are over.
void CudaLink::tell_landed() {
  for (; !summed_.empty() && copier_ && lost_.ok(); summed_.pop_front()) {
    Summed& piece = summed_.front();
    const bool is_over = piece.ticket <= done_;
    const auto found = batches_.find(piece.batch);
    if (found != batches_.end() && !found->second.failing && !found->second.over) {
      // Of a batch's last piece kSum says the rest.
      const bool rest = is_over && piece.ticket != found->second.last;
      const uint64_t landed = rest ? piece.bytes : copier_->landed(piece.ticket);
      Header header;
      header.type = Type::kLanded;
      header.batch = piece.batch;
      header.region = piece.copy;
      header.tag = landed - std::exchange(piece.told, landed);
      if (header.tag != 0) post(header);
      if (!lost_.ok()) return;  // and nothing of the batch matters any more
      if (is_over) found->second.sum += weighted(piece.copy, copier_->sum(piece.ticket));
    }
    if (!is_over) return;
  }
}

// Pieces that are over at this end, and checks that are at the other.
void CudaLink::settle_sums() {
  // The caller has just asked for the latest piece.
  if (!summed_.empty() && summed_.front().ticket != launched_) (void)over(summed_.front().ticket);
  tell_landed();
  if (!verifier_) return;
  for (Verifier::Verdict& verdict : verifier_->settle()) {
    if (verdict.end.tagged) {
      Completion arrived = local::arrival(peer_, verdict.end, verdict.tail);
      arrived.status = verdict.status;
      if (!verdict.status.ok()) arrived.tail.clear();
      complete(std::move(arrived));
    }
    acknowledge(verdict.end.batch, verdict.status, verdict.end.tagged != 0);
  }
}

// The last word on a batch. None of its pieces is running.
void CudaLink::finish(BatchId id, Batch& batch, Status status) {
  if (batch.over) return;
  batch.over = true;
  batch.status = status;
  if (batch.announced && !batch.ended) give_up(id);
  for (Prepared& prepared : batch.copies)
    if (prepared.tables != 0 && copier_) copier_->release(prepared.tables);
  batch.copies.clear();
  Completion sent;
  sent.peer = peer_;
  sent.batch = id;
  sent.status = status;
  complete(std::move(sent));
}

// Is nothing of the batch under way, in either half?
bool CudaLink::still(const Batch& batch) {
  return over(batch.last) && (batch.staged == Half::kUnused || batch.staged == Half::kOver || !staged_);
}

// What the staged half has of it is given up by settle_batches(), on the worker.
Status CudaLink::fail(BatchId id, Batch& batch, Status status) {
  if (batch.over || batch.failing || batch.handed_over) return batch.status;
  batch.failing = true;
  batch.status = status;
  if (std::exchange(batch.ahead, false)) give_up(id);
  if (still(batch)) finish(id, batch, status);
  return status;
}

// May the end of the batch be sent before its last piece is over?
bool CudaLink::ends_ahead(const Batch& batch) const {
  return copier_ && copier_->tells() && static_cast<uint32_t>(batch.last) != 0;
}

// A receiver looks at the progress for kHotTime after an end, unless its thread has to wait for a processor.
void CudaLink::settle_ahead() {
  while (!ahead_.empty()) {
    EndAhead& first = ahead_.front();
    const auto found = batches_.find(first.batch);
    if (found == batches_.end() || !found->second.ahead) {  // it was answered, or given up
      ahead_.pop_front();
      continue;
    }
    if (!connection_.progress->reached(static_cast<uint32_t>(first.piece))) return;
    const Clock::time_point now = Clock::now();
    if (first.in_place == Clock::time_point{}) first.in_place = now;
    if (now < std::min(first.in_place + kAnswerTime, first.sent + kHotTime)) return;
    Header in_place;
    in_place.type = Type::kInPlace;
    in_place.batch = first.batch;
    found->second.ahead = false;
    ahead_.pop_front();
    // Of a broken socket nothing is said here: an answer may be left in it, and who reads it sees the rest.
    if (outbox_.offer(in_place, {}) == EAGAIN) keep(in_place);
  }
}

// No end will come; one that was sent ahead is asked back, and its acknowledgement says whether that came too late.
void CudaLink::give_up(BatchId id) {
  Header header;
  header.type = Type::kGiveUp;
  header.batch = id;
  post(header);
}

void CudaLink::settle_awaited() {
  while (auto end = awaited_.next(*connection_.peer_progress)) deliver(end->header, end->tail);
}

void CudaLink::deliver(const Header& end, ByteView tail) {
  if (end.tagged) complete(local::arrival(peer_, end, tail));
  acknowledge(end.batch, kOkStatus, end.tagged != 0);
}

void CudaLink::complete(Completion completion) {
  ready_.push_back(std::move(completion));
  ready_count_.store(ready_.size(), std::memory_order_release);
  wake_worker();
}

void CudaLink::settle_batches() {
  for (auto& [id, batch] : batches_) {
    if (!batch.failing || batch.over) continue;
    if (staged_ && (batch.staged == Half::kOpen || batch.staged == Half::kEnded)) staged_->cancel(id);
    if (still(batch)) finish(id, batch, batch.status);
  }
}

bool CudaLink::staged_over(BatchId id, Status status) {
  const std::lock_guard lock(mutex_);
  const auto found = batches_.find(id);
  if (found == batches_.end()) return false;
  Batch& batch = found->second;
  if (batch.handed_over) {
    batches_.erase(found);
    return true;
  }
  batch.staged = Half::kOver;
  if (!status.ok()) fail(id, batch, status);
  if (batch.failing && still(batch)) finish(id, batch, batch.status);
  core_->wake();  // notify goes on
  return false;
}

bool CudaLink::hot(Clock::time_point now) const {
  const std::lock_guard lock(mutex_);
  return busy(now);
}

size_t CudaLink::take(std::span<Completion> out) {
  const std::lock_guard lock(mutex_);
  if (!outbox_.empty()) flush();  // above all acknowledgements of what the last call handed on
  taking_ = true;
  if (busy(Clock::now())) read_messages();
  // One half does not go on without the other, once all that the other end said before it closed is read, above all
  // acknowledgements: reading stops where there is something to hand on, and goes on with the next call.
  if (const Status s = lost_.ok() && staged_ ? staged_->lost() : kOkStatus; !s.ok() && ready_.empty()) {
    read_messages();
    if (ready_.empty()) lose(s);
  }
  if (launched_ != done_) {
    (void)over(launched_);
    settle_revoked();
  }
  settle_sums();
  settle_ahead();
  settle_awaited();
  settle_batches();
  size_t n = 0;
  for (; n < out.size() && !ready_.empty(); ready_.pop_front()) {
    out[n] = std::move(ready_.front());
    if (out[n].kind == Completion::Kind::kSent) batches_.erase(out[n].batch);
    ++n;
  }
  ready_count_.store(ready_.size(), std::memory_order_release);
  taking_ = false;
  return n;
}

// Are all pairs inside their regions, and where do those begin on the device? A region is looked up once: a submit is
// mostly such look-ups.
Status CudaLink::make_tables(Prepared& prepared, const PagedCopy& copy) {
  src_.clear();
  dst_.clear();
  bool all_here = true;
  Status missing;
  const auto imported = [&](RegionId id) -> uint64_t {
    const auto found = imports_.find(id);
    if (found == imports_.end()) return 0;
    const Import& import = found->second;
    if (missing.ok() && !import.refused.ok()) missing = import.refused;
    if (missing.ok() && !import.unmapped.empty())
      missing = {Code::kUnavailable, 0, "a region lost its mapping with the batch under way"};
    all_here = all_here && import.address != 0;  // else its descriptors are under way
    dst_.push_back(import.address);
    return import.region.buffer.bytes;
  };
  if (const Status s = check_range(copy, Side::kDst, imported); !s.ok()) return s;
  const auto local = [&](RegionId id) -> uint64_t {
    const auto found = core_->regions.find(id);
    if (found == core_->regions.end()) return 0;
    src_.push_back(reinterpret_cast<uint64_t>(found->second.buffer.data));
    return found->second.buffer.bytes;
  };
  {
    const std::lock_guard lock(core_->regions_mutex);
    if (const Status s = check_range(copy, Side::kSrc, local); !s.ok()) return s;
  }
  if (!missing.ok() || !all_here) return missing;
  const Status status = copier_->prepare(copy, DeviceForm::kPaged, src_, dst_, prepared.tables);
  if (status.code == Code::kInternal) device_failed(status);
  return status;
}

Status CudaLink::prepare(Batch& batch, const TransferPlan& plan, uint32_t copy_index, const Cursor& cursor,
                         bool& ready) {
  ready = false;
  const PagedCopy& copy = plan.copies[copy_index];
  if (!inside(copy, cursor)) return {Code::kInvalid, 0, "cursor outside its copy"};
  Prepared& prepared = batch.copies[copy_index];
  const uint64_t local_generation = core_->generation.load(std::memory_order_acquire);
  if (prepared.tables != 0 && prepared.local_generation == local_generation &&
      prepared.import_generation == import_generation_) {
    ready = true;
    return kOkStatus;
  }
  if (prepared.tables != 0) copier_->release(prepared.tables);
  prepared.tables = 0;
  if (prepared.local_generation == 0)
    if (const Status s = check_sealed(copy); !s.ok()) return s;
  // As it was before the look-up: a region deregistered meanwhile makes the next call look again.
  prepared.local_generation = local_generation;
  prepared.import_generation = import_generation_;
  if (const Status s = make_tables(prepared, copy); !s.ok()) return s;
  ready = prepared.tables != 0;
  return kOkStatus;
}

// Is everything here device memory, and everything there mapped, so that no copy needs to be looked at?
bool CudaLink::all_mapped() {
  const uint64_t generation = core_->generation.load(std::memory_order_acquire);
  if (generation == mapped_.local_generation && import_generation_ == mapped_.import_generation) return mapped_.all;
  const std::lock_guard lock(core_->regions_mutex);
  mapped_ = {generation, import_generation_, true};
  for (const auto& [id, import] : imports_) mapped_.all = mapped_.all && import.address != 0;
  for (const auto& [id, region] : core_->regions) mapped_.all = mapped_.all && region.buffer.device != kHost;
  return mapped_.all;
}

CudaLink::Route CudaLink::choose_route(const PagedCopy& copy) {
  if (all_mapped()) return Route::kMapped;
  Route route = Route::kMapped;
  const std::lock_guard lock(core_->regions_mutex);
  for (const RegionPair& p : copy.pairs) {
    const auto found = imports_.find(p.dst);
    const auto local = core_->regions.find(p.src);
    if (found == imports_.end() || local == core_->regions.end() || !found->second.refused.ok())
      return Route::kMapped;  // which refuses it
    const Import& import = found->second;
    if (import.address == 0 && import.unmapped.empty()) return Route::kUndecided;
    if (!import.unmapped.empty() || local->second.buffer.device == kHost) route = Route::kStaged;
  }
  return route;
}

Status CudaLink::submit_staged(BatchId id, Batch& batch, const TransferPlan& plan, uint32_t copy_index,
                               Cursor& cursor) {
  batch.staged = Half::kOpen;
  const Status status = staged_->submit(id, plan, copy_index, cursor);
  return status.ok() ? status : fail(id, batch, status);
}

Status CudaLink::submit(BatchId id, const TransferPlan& plan, uint32_t copy_index, Cursor& cursor) {
  const std::lock_guard lock(mutex_);
  Batch& batch = batches_[id];
  if (batch.over || batch.failing || batch.handed_over) return batch.status;
  if (!lost_.ok()) return fail(id, batch, lost_);
  if (copy_index >= plan.copies.size()) return fail(id, batch, {Code::kInvalid, 0, "no such copy in the plan"});
  if (at_end(plan.copies[copy_index], cursor)) return kOkStatus;
  if (batch.copies.size() < plan.copies.size()) batch.copies.resize(plan.copies.size());
  Route& route = batch.copies[copy_index].route;
  if (route == Route::kUndecided) route = choose_route(plan.copies[copy_index]);
  if (route == Route::kUndecided) return kOkStatus;
  if (route == Route::kStaged) return submit_staged(id, batch, plan, copy_index, cursor);
  batch.mapped = true;
  if (!broken_.ok()) return fail(id, batch, broken_);
  bool ready = false;
  if (const Status s = prepare(batch, plan, copy_index, cursor, ready); !s.ok()) return fail(id, batch, s);
  if (!ready) return kOkStatus;
  if (launched_ - done_ >= kPiecesInFlight && !over(done_ + 1)) return kOkStatus;
  DeviceTicket ticket = 0;
  const PagedCopy& copy = plan.copies[copy_index];
  const Cursor before = cursor;
  const Status status = copier_->launch(batch.copies[copy_index].tables, copy, cursor,
                                        core_->context.limits.device_chunk_bytes, 0, ticket);
  if (!status.ok()) {
    device_failed(status);
    return fail(id, batch, status);
  }
  if (ticket == 0) return kOkStatus;
  batch.last = launched_ = ticket;
  // The other end wakes up while the bytes are on their way; an end that follows at once does it too.
  const bool last = copy_index + 1 == plan.copies.size() && at_end(copy, cursor);
  if (!batch.begun && !(last && batch.staged == Half::kUnused && ends_ahead(batch))) {
    batch.begun = true;
    Header begin;
    begin.type = Type::kBegin;
    begin.batch = id;
    post(begin);
  }
  if (core_->options.checksum) {
    summed_.push_back({ticket, id, copy_index, bytes_between(copy, before, cursor)});
    batch.announced = true;
    if (before == Cursor{}) announce(id, copy, copy_index);
  }
  return kOkStatus;
}

// A batch of staged copies alone is ended there. Else the staged half ends its part first, without a tag, and this one
// ends the batch when that has been acknowledged. False: not yet.
bool CudaLink::notify_staged(BatchId id, Batch& batch, std::optional<uint64_t> tag, ByteView tail) {
  if (batch.staged == Half::kEnded) return false;
  if (!staged_->notify(id, batch.mapped ? std::nullopt : tag, batch.mapped ? ByteView() : tail)) return false;
  batch.staged = Half::kEnded;
  batch.handed_over = !batch.mapped;
  return batch.handed_over;
}

// The end goes out while the last piece is on its way, where the receiver can see for itself when it is over, and else
// when it is: its writes are visible to the whole system then.
bool CudaLink::notify(BatchId id, std::optional<uint64_t> tag, ByteView tail) {
  const std::lock_guard lock(mutex_);
  Batch& batch = batches_[id];
  if (batch.over || batch.failing || batch.ended || batch.handed_over) return true;
  if (!lost_.ok()) return fail(id, batch, lost_), true;
  if (tail.size() > core_->context.limits.max_tail_bytes)
    return fail(id, batch, {Code::kInvalid, 0, "tail larger than the limit"}), true;
  if (batch.staged == Half::kOpen || batch.staged == Half::kEnded) return notify_staged(id, batch, tag, tail);
  const bool ahead = batch.last > done_ && ends_ahead(batch);
  if (!ahead && !over(batch.last)) return false;
  if (batch.failing) return true;  // what over() found
  if (batch.announced && !std::exchange(batch.summed, true)) {
    Header sum;
    sum.type = Type::kSum;
    sum.batch = id;
    sum.tag = batch.sum;
    post(sum);
  }
  Header end = local::end_of(Type::kEnd, id, tag);
  if (ahead) end.piece = static_cast<uint32_t>(batch.last);
  const int error = outbox_.offer(end, tail);
  if (error == EAGAIN) return false;  // the poll thread wakes the worker when there is room
  if (error != 0) return lose({Code::kPeerLost, error, "sendmsg"}), true;
  batch.ended = true;
  const Clock::time_point now = Clock::now();
  hot_until_ = now + kHotTime;
  if (ahead) ahead_.push_back({id, batch.last, now});
  batch.ahead = ahead;
  return true;
}

void CudaLink::cancel(BatchId id) {
  const std::lock_guard lock(mutex_);
  Batch& batch = batches_[id];
  if (batch.handed_over) return staged_->cancel(id);
  if (batch.over) return;
  // The answer to an ended batch is its acknowledgement: all of it is in place, or, of one whose end was sent ahead,
  // the receiver is asked to let go of that.
  if (!batch.ended)
    fail(id, batch, {Code::kCancelled, 0, "cancelled by the sender"});
  else if (std::exchange(batch.ahead, false))
    give_up(id);
}

Status CudaLink::lost() const {
  const std::lock_guard lock(mutex_);
  return lost_.ok() && staged_ ? staged_->lost() : lost_;
}

}  // namespace pdxfer::transport::cuda_ipc
