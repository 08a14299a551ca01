// Batches of a link: what goes which way, and when each is over; see rdma_link.hpp.
#include "transport/rdma/rdma_link.hpp"

#include <algorithm>

#include "transport/check_copy.hpp"

namespace pdxfer::transport::rdma {
namespace {

constexpr uint64_t kMostBytes = 16 << 20;  // outstanding on one rail: bounds what a cancel waits for
constexpr size_t kMostPending = 1024;      // messages not yet posted after which nothing new is taken

}  // namespace

OutBatch& RdmaLink::open(BatchId batch, const TransferPlan* plan) {
  std::unique_ptr<OutBatch>& out = batches_[batch];
  if (out == nullptr) {
    out = std::make_unique<OutBatch>();
    out->id = batch;
    out->number = ++opened_;
    out->alone = ++live_ == 1;
  }
  if (plan != nullptr && out->plan == nullptr) {
    out->plan = plan;
    out->copies.resize(plan->copies.size());
  }
  return *out;
}

// Everything that may be wrong with a piece, before any of it is promised; O(pairs) when a region of either end
// went, else O(1).
Status RdmaLink::check(OutBatch& out, uint32_t copy_index, const Cursor& cursor) {
  if (copy_index >= out.copies.size()) return {Code::kInvalid, 0, "no such copy in the plan"};
  const PagedCopy& copy = out.plan->copies[copy_index];
  OutBatch::CopyState& state = out.copies[copy_index];
  if (state.epoch != hub_.epoch) {
    if (copy_index >= kMaxCopies || copy.pairs.size() > kMaxPairs || copy.runs.size() > kMaxRuns)
      return {Code::kInvalid, 0, "copy with too many pairs or runs"};
    if (const Status s = check_sealed(copy); !s.ok()) return s;
    const auto mine = [&](RegionId id) {
      const LocalRegion* region = hub_.find(id);
      return region == nullptr ? uint64_t{0} : region->buffer.bytes;
    };
    const auto theirs = [&](RegionId id) {
      const auto found = imported_.find(id);
      return found == imported_.end() ? uint64_t{0} : found->second.bytes;
    };
    if (const Status s = check_range(copy, Side::kSrc, mine); !s.ok()) return s;
    if (const Status s = check_range(copy, Side::kDst, theirs); !s.ok()) return s;
    state.src.clear();  // an id may have come back with other memory
    for (const RegionPair& p : copy.pairs) state.src.push_back(hub_.find(p.src)->buffer.data);
    state.epoch = hub_.epoch;
  }
  return inside(copy, cursor) ? kOkStatus : Status{Code::kInvalid, 0, "cursor outside its copy"};
}

void RdmaLink::decide(OutBatch& out, OutBatch::CopyState& state, const PagedCopy& copy) {
  state.decided = true;
  if (out.begun == Clock::time_point{}) out.begun = Clock::now();
  last_ = estimate(copy, rates_);
  const RdmaOptions::Path path = hub_.context.rdma.path;
  bool packed = path == RdmaOptions::Path::kPacked || (path == RdmaOptions::Path::kAuto && last_.packed());
  for (const RegionPair& p : copy.pairs) packed = packed && hub_.find(p.src)->buffer.device == kHost;
  if (packed) {
    state.stream = copy;
    packed = number_stream(state.stream, Side::kDst);
    state.stream.seal();
  }
  state.packed = packed;
  ++(packed ? packed_copies_ : direct_copies_);
  out.packed |= packed;
  out.direct_requests += packed ? 0 : last_.requests;
}

void RdmaLink::learn(const OutBatch& out) {
  if (!out.alone || out.packed || out.number != opened_ || out.strikes > 0 || out.plan == nullptr) return;
  const std::chrono::duration<double, std::nano> took = Clock::now() - out.begun;
  request_cost_.learn(rates_, out.direct_requests, out.plan->bytes(), took.count());
}

// The rail with the least bytes under way, or none when all are full or down.
Rail* RdmaLink::choose() noexcept {
  Rail* best = nullptr;
  for (const auto& rail : rails_)
    if (rail->up() && rail->room() > 0 && rail->bytes() < kMostBytes &&
        (best == nullptr || rail->bytes() < best->bytes()))
      best = rail.get();
  return best;
}

std::optional<Keys> RdmaLink::keys_for(const Work& work, const Rail& rail) const noexcept {
  const size_t port = static_cast<size_t>(rail.pair.local);
  Keys keys;
  if (work.src == kArena) {
    keys.local = arena_.read[port].local();
  } else if (const LocalRegion* region = hub_.find(work.src); region != nullptr) {
    keys.local = region->keys[port].local();
  } else if (work.src != kNoId) {
    return std::nullopt;
  }
  if (work.dst == kStaging) {
    keys.remote = theirs_.rkeys[rail.pair.remote];
  } else if (const auto found = imported_.find(work.dst); found != imported_.end()) {
    keys.remote = found->second.key.rkeys[rail.pair.remote];
  } else if (work.dst != kNoId) {
    return std::nullopt;
  }
  return keys;
}

// Fills works_, keys_ and after_ from the cursor on: neighbours at the destination become one request, gathered from
// several pieces where the sources are apart.
uint32_t RdmaLink::unroll(OutBatch& out, const PagedCopy& copy, Cursor cursor, const Rail& rail, uint32_t limit) {
  const uint64_t budget = hub_.context.limits.chunk_bytes;
  uint32_t n = 0;
  uint32_t pair_of_keys = UINT32_MAX;
  Keys keys;
  uint64_t src_base = 0, dst_base = 0;
  for (uint64_t moved = 0; moved < budget && !at_end(copy, cursor);) {
    Cursor next = cursor;
    const Extent e = next_extent(copy, next, std::min<uint64_t>(budget - moved, rail.port.max_message));
    const RegionPair& p = copy.pairs[e.pair];
    const bool same_pair = e.pair == pair_of_keys;
    const uint64_t from = same_pair ? src_base + e.src_offset : 0;
    const uint64_t to = same_pair ? dst_base + e.dst_offset : 0;
    Work* last = n > 0 && same_pair ? &works_[n - 1] : nullptr;
    if (last != nullptr && last->remote + last->bytes == to && last->bytes + e.bytes <= rail.port.max_message &&
        (last->piece[last->pieces - 1].first + last->piece[last->pieces - 1].second == from ||
         last->pieces < rail.port.max_sge)) {
      auto& piece = last->piece[last->pieces - 1];
      if (piece.first + piece.second == from)
        piece.second += static_cast<uint32_t>(e.bytes);
      else
        last->piece[last->pieces++] = {from, static_cast<uint32_t>(e.bytes)};
      last->bytes += static_cast<uint32_t>(e.bytes);
    } else {
      if (n == limit) break;
      Work& work = works_[n];
      work = Work{Work::Kind::kExtent, &out, 0, p.src, p.dst, 0, static_cast<uint32_t>(e.bytes), 1, {}};
      if (!same_pair) {
        const std::optional<Keys> found = keys_for(work, rail);
        if (!found) break;  // check() saw both regions a moment ago
        keys = *found;
        pair_of_keys = e.pair;
        src_base = reinterpret_cast<uint64_t>(hub_.find(p.src)->buffer.data);
        dst_base = imported_.at(p.dst).key.address;
      }
      work.piece[0] = {src_base + e.src_offset, static_cast<uint32_t>(e.bytes)};
      work.remote = dst_base + e.dst_offset;
      keys_[n++] = keys;
    }
    moved += e.bytes;
    cursor = next;
    after_[n - 1] = cursor;
  }
  return n;
}

void RdmaLink::submit_direct(OutBatch& out, const PagedCopy& copy, Cursor& cursor) {
  Rail* rail = choose();
  if (rail == nullptr) return;
  const uint32_t n = unroll(out, copy, cursor, *rail, std::min(rail->room(), kMaxChain));
  const uint32_t taken = rail->post({works_.data(), n}, {keys_.data(), n});
  if (taken == 0) return;
  hub_.touch();
  out.touched = true;
  out.outstanding += taken;
  cursor = after_[taken - 1];
}

void RdmaLink::submit_packed(OutBatch& out, uint32_t copy_index, Cursor& cursor) {
  OutBatch::CopyState& state = out.copies[copy_index];
  const auto unfreed = static_cast<uint32_t>(chunks_made_) - chunks_freed_;
  Rail* rail = choose();
  if (rail == nullptr || unfreed >= std::min(arena_.slots, theirs_.slots) || pending_.size() >= kMostPending) return;
  if (cursor == Cursor{}) send_plan(out, copy_index);
  const uint64_t number = chunks_made_++;
  Chunk& chunk = chunks_[number % arena_.slots];
  chunk = {&out, {}, false};
  chunk.announcement.batch = out.id;
  const Cursor from = cursor;
  const RegionPair& first = state.stream.pairs[from.pair];
  const uint64_t at =
      first.dst_offset + (uint64_t{state.stream.runs[from.run].dst_slot} + from.slot) * first.slot_bytes + from.byte;
  const auto base = reinterpret_cast<uintptr_t>(arena_.outbound(number)) - at;
  state.dst.assign(state.stream.pairs.size(), reinterpret_cast<std::byte*>(base));
  const auto bytes = static_cast<uint32_t>(
      hub_.context.copy(state.stream, cursor, std::min(arena_.slot_bytes, theirs_.slot_bytes), state.src, state.dst));
  MessageHeader& say = chunk.announcement;
  say.words[0] = copy_index;
  say.words[1] = bytes;
  say.words[2] = from.pair;
  say.words[3] = from.run;
  say.longs[0] = from.slot;
  say.longs[1] = from.byte;
  out.touched = true;
  ++out.outstanding;
  Work work{Work::Kind::kChunk, nullptr, number, kArena, kStaging, 0, bytes, 1, {}};
  work.piece[0] = {reinterpret_cast<uint64_t>(arena_.outbound(number)), bytes};
  work.remote = theirs_.staging + number % theirs_.slots * theirs_.slot_bytes;
  const std::optional<Keys> keys = keys_for(work, *rail);
  if (!keys || rail->post({&work, 1}, {&*keys, 1}) == 0) retry_.push_back(work);
}

Status RdmaLink::submit(BatchId batch, const TransferPlan& plan, uint32_t copy_index, Cursor& cursor) {
  const std::lock_guard lock(hub_.mutex);
  OutBatch& out = open(batch, &plan);
  if (!out.given_up.ok()) return out.given_up;
  if (!lost_.ok()) return give_up(out, lost_);
  if (out.over || out.ended) return {Code::kInvalid, 0, "the batch was ended before"};
  if (copy_index < plan.copies.size() && at_end(plan.copies[copy_index], cursor)) return kOkStatus;
  if (const Status s = check(out, copy_index, cursor); !s.ok()) return give_up(out, s);
  const PagedCopy& copy = plan.copies[copy_index];
  OutBatch::CopyState& state = out.copies[copy_index];
  if (!state.decided) decide(out, state, copy);
  if (state.packed)
    submit_packed(out, copy_index, cursor);
  else
    submit_direct(out, copy, cursor);
  return kOkStatus;
}

bool RdmaLink::notify(BatchId batch, std::optional<uint64_t> tag, ByteView tail) {
  const std::lock_guard lock(hub_.mutex);
  OutBatch& out = open(batch, nullptr);
  if (out.over || out.ended || !out.given_up.ok()) return true;
  if (!lost_.ok()) return give_up(out, lost_), true;
  if (tail.size() > hub_.context.limits.max_tail_bytes)
    return give_up(out, {Code::kInvalid, 0, "tail larger than the limit"}), true;
  if (pending_.size() >= kMostPending) return false;
  out.tag = tag;
  out.tail.assign(tail.begin(), tail.end());
  out.touched = out.ended = true;
  hub_.touch();
  settle(out);
  pump();
  return true;
}

void RdmaLink::cancel(BatchId batch) {
  const std::lock_guard lock(hub_.mutex);
  OutBatch& out = open(batch, nullptr);
  if (out.over || !out.given_up.ok()) return;
  give_up(out, {Code::kCancelled, 0, "cancelled by the sender"});
  pump();
}

// What is under way must be through before the other end is told, and before anybody is told here.
Status RdmaLink::give_up(OutBatch& out, Status why) {
  if (out.over || !out.given_up.ok()) return out.given_up;
  out.given_up = why;
  out.ended = true;
  std::erase_if(retry_, [&](const Work& work) {
    const bool mine = work.kind == Work::Kind::kExtent && work.batch == &out;
    if (mine) --out.outstanding;
    return mine;
  });
  if (!lost_.ok() || !out.touched)
    finish(out, why);
  else
    settle(out);
  return why;
}

void RdmaLink::settle(OutBatch& out) {
  if (!out.ended || out.end_sent || out.over || out.outstanding > 0) return;
  out.end_sent = true;
  send_end(out);
}

void RdmaLink::work_done(const Work& work) {
  fruitless_since_ = {};
  if (work.kind == Work::Kind::kExtent) {
    --work.batch->outstanding;
    settle(*work.batch);
  } else if (work.kind == Work::Kind::kChunk) {
    chunks_[work.number % arena_.slots].written = true;
    announce();
  } else if (work.kind == Work::Kind::kMessage) {
    messages_acked_ = std::max(messages_acked_, work.number + 1);
  }
}

void RdmaLink::finish(OutBatch& out, Status status) {
  if (std::exchange(out.over, true)) return;
  --live_;
  if (status.ok()) learn(out);
  if (out.given_up.ok()) out.given_up = status;
  Completion& sent = ready_.emplace_back();
  sent.peer = peer_;
  sent.batch = out.id;
  sent.tag = out.tag.value_or(0);
  sent.status = status;
  hub_.wake();
}

size_t RdmaLink::take_completions(std::span<Completion> out) {
  size_t n = 0;
  for (; n < out.size() && !ready_.empty(); ready_.pop_front()) {
    out[n] = std::move(ready_.front());
    if (out[n].kind == Completion::Kind::kSent) batches_.erase(out[n].batch);
    ++n;
  }
  return n;
}

}  // namespace pdxfer::transport::rdma
