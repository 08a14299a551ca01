// Filling and writing windows; see sender.hpp.
#include "transport/stream/sender.hpp"

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstring>
#include <utility>

#include "core/paged_copy.hpp"
#include "transport/stream/small_extents.hpp"

namespace pdxfer::transport::stream {
namespace {
constexpr size_t kScratch = 64 << 10;
constexpr uint64_t kWindow = 128 << 10;  // at most, but for a plan's end: amortises a system call, stays in cache
static_assert(kWindow < kPackBytes);
constexpr size_t kPlanReserve = 4096;  // begin a frame only when this much scratch is left, so that it gets somewhere
alignas(64) constexpr std::byte kZeros[64 << 10] = {};

// What is waiting when the worker is asked for more has to last until it has woken up; the GPU is quicker than a
// socket.
uint64_t queue_bytes(const Limits& limits, SlotRing* ring) noexcept {
  const uint64_t pieces = std::max<uint64_t>(2 * limits.chunk_bytes, 1 << 20);
  return ring == nullptr ? pieces : std::max(pieces, 4 * ring->outgoing().slot_bytes());
}
}  // namespace

Sender::Sender(LinkState& link, Channel& channel, uint32_t index, DeviceLane& lane, SlotRing* ring)
    : link_(link),
      channel_(channel),
      index_(index),
      ring_(ring),
      queue_(queue_bytes(link.limits, ring)),
      gathers_(link, lane, ring),
      scratch_(kScratch) {
  ends_.reserve(64);
  slots_.reserve(64);
}

int Sender::pump(uint64_t budget, bool& moved) {
  uint64_t done = 0;
  take_ahead();  // gathers run while this window is written
  while (done < budget) {
    if (at_ == end_) {
      fill();
      if (at_ == end_) return 0;
    }
    const int64_t n = channel_.writev({iov_.data() + at_, end_ - at_});
    if (timed_ != nullptr) tell(n);
    if (n <= 0) return static_cast<int>(n);
    consume(static_cast<uint64_t>(n));
    done += static_cast<uint64_t>(n);
    moved = true;
  }
  return 1;
}

void Sender::consume(uint64_t bytes) {
  while (bytes > 0) {
    iovec& first = iov_[at_];
    const uint64_t step = std::min<uint64_t>(bytes, first.iov_len);
    first.iov_base = static_cast<std::byte*>(first.iov_base) + step;
    first.iov_len -= step;
    bytes -= step;
    if (first.iov_len == 0) ++at_;
  }
  if (at_ < end_) return;
  // Everything of these batches on this stream is with the channel: nothing here points to them any more.
  for (Outbound* batch : ends_) {
    const BatchId id = batch->id;
    if (batch->ends_left.fetch_sub(1, std::memory_order_acq_rel) == (Outbound::kAcked | 1))
      link_.post({LinkEvent::Kind::kFlushed, id, {}, {}});
  }
  ends_.clear();
  for (const uint32_t slot : slots_) gathers_.give_back(slot);
  slots_.clear();
}

void Sender::append(const void* data, uint64_t bytes) noexcept {
  if (bytes == 0) return;
  window_ += bytes;
  // Neighbours in memory are one entry, wherever the walk cut them: source pages often lie in order.
  if (end_ > 0) {
    iovec& last = iov_[end_ - 1];
    if (static_cast<const std::byte*>(last.iov_base) + last.iov_len == data) {
      last.iov_len += bytes;
      return;
    }
  }
  iov_[end_++] = {const_cast<void*>(data), bytes};
}

void Sender::append_header(const FrameHeader& header) noexcept {
  std::memcpy(scratch_.data() + scratch_used_, &header, kHeaderBytes);
  append(scratch_.data() + scratch_used_, kHeaderBytes);
  scratch_used_ += kHeaderBytes;
}

void Sender::fill() {
  at_ = end_ = scratch_used_ = 0;
  window_ = 0;
  const uint64_t segment = channel_.segment();
  goal_ = segment < kWindow ? kWindow - kWindow % segment : kWindow;
  snapshots_.clear();
  // Two entries are the most that one step below appends before it looks again (a header and a tail).
  while (end_ + 2 <= iov_.size() && window_ < goal_ && scratch_used_ + kPlanReserve <= kScratch) {
    if (in_plan_)
      append_plan();
    else if (in_chunk_)
      append_extents();
    else if (!begin_next())
      break;
  }
  pack();
}

// Gathers the window's extents into one, or leaves them to the kernel: small ones as was found to be faster.
void Sender::pack() {
  const std::span<const iovec> extents(iov_.data(), end_);
  timed_ = nullptr;
  if (window_ > kPackBytes || !worth_packing(window_, end_, kSmallSent)) return prefetch_beginnings(extents);
  const bool smallest = worth_packing(window_, end_, kSmallest);
  timed_ = smallest ? &smallest_ : &small_;
  way_ = timed_->next();
  filled_ = std::chrono::steady_clock::now();
  if (way_ == CopyWay::kDirect) return prefetch_beginnings(extents);
  if (way_ == CopyWay::kFirstLevel)
    gather<CacheLevel::kFirst>(extents, packed_.data());
  else
    (smallest ? gather_at_once : gather<CacheLevel::kSecond>)(extents, packed_.data());
  iov_[0] = {packed_.data(), window_};
  end_ = 1;
}

// Of the first write of a window. What the channel did not take whole says nothing.
void Sender::tell(int64_t written) noexcept {
  if (written == static_cast<int64_t>(window_))
    timed_->tell(way_, window_, static_cast<uint64_t>((std::chrono::steady_clock::now() - filled_).count()));
  timed_ = nullptr;
}

void Sender::take_ahead() {
  bool hungry = false;
  gathers_.fill(queue_, hungry);
  if (hungry) link_.wake();
}

// The next frame's header, acknowledgements first: they free the other end's batches. False when there is nothing.
bool Sender::begin_next() {
  if (!acks_.empty()) {
    append_header(acks_.front());
    acks_.pop_front();
    return true;
  }
  for (auto front = Gathers::Front::kNone; front == Gathers::Front::kNone;) {
    take_ahead();
    if (gathers_.empty()) return false;
    front = gathers_.next(item_, slot_);  // kNone: what was taken belonged to batches given up meanwhile
    if (front == Gathers::Front::kWait) return false;
  }
  if (item_.bytes == 0) {
    gathers_.end(*item_.batch);
    append_end(*item_.batch);
    return true;
  }
  if (slot_ == SlotPool::kNone && !admit(link_, item_)) return true;
  const PagedCopy& copy = item_.batch->plan->copies[item_.copy];
  left_ = item_.bytes;
  zeros_ = false;
  in_chunk_ = true;
  if (item_.with_plan) {
    FrameHeader header;
    header.type = FrameType::kPlan;
    header.batch = item_.batch->id;
    header.copy = item_.copy;
    header.words[0] = static_cast<uint32_t>(copy.pairs.size());
    header.words[1] = static_cast<uint32_t>(copy.runs.size());
    header.body = copy.pairs.size() * sizeof(WirePair) + copy.runs.size() * sizeof(WireRun);
    append_header(header);
    plan_pair_ = plan_run_ = 0;
    in_plan_ = true;
  }
  return true;
}

void Sender::append_end(Outbound& batch) {
  FrameHeader header;
  header.type = FrameType::kEnd;
  header.batch = batch.id;
  header.words[0] = static_cast<uint32_t>(batch.stop.load(std::memory_order_acquire));
  header.words[1] = static_cast<uint32_t>(std::popcount(batch.streams));
  header.count = batch.bytes;
  header.flags = batch.tag.has_value() ? kTagged : 0;
  header.tag = batch.tag.value_or(0);
  const bool carries_tail = static_cast<uint32_t>(std::countr_zero(batch.streams)) == index_ && !batch.tail.empty();
  header.body = carries_tail ? batch.tail.size() : 0;
  append_header(header);
  if (carries_tail) append(batch.tail.data(), batch.tail.size());
  ends_.push_back(&batch);
}

void Sender::append_plan() noexcept {
  const PagedCopy& copy = item_.batch->plan->copies[item_.copy];
  std::byte* const begin = scratch_.data() + scratch_used_;
  std::byte* to = begin;
  std::byte* const stop = scratch_.data() + kScratch - kHeaderBytes;
  for (; plan_pair_ < copy.pairs.size() && to + sizeof(WirePair) <= stop; ++plan_pair_) {
    const WirePair wire = wire_of(copy.pairs[plan_pair_]);
    std::memcpy(to, &wire, sizeof wire);
    to += sizeof wire;
  }
  if (plan_pair_ == copy.pairs.size()) {
    for (; plan_run_ < copy.runs.size() && to + sizeof(WireRun) <= stop; ++plan_run_) {
      const WireRun wire = wire_of(copy.runs[plan_run_]);
      std::memcpy(to, &wire, sizeof wire);
      to += sizeof wire;
    }
  }
  const auto bytes = static_cast<size_t>(to - begin);
  append(begin, bytes);
  scratch_used_ += bytes;
  in_plan_ = plan_pair_ < copy.pairs.size() || plan_run_ < copy.runs.size();
}

void Sender::append_extents() noexcept {
  const PagedCopy& copy = item_.batch->plan->copies[item_.copy];
  if (left_ == item_.bytes) {
    FrameHeader header;
    header.type = FrameType::kChunk;
    header.batch = item_.batch->id;
    header.body = left_;
    header.copy = item_.copy;
    header.words[0] = item_.cursor.pair;
    header.words[1] = item_.cursor.run;
    header.words[2] = item_.cursor.slot;
    header.count = item_.cursor.byte;
    if (slot_ != SlotPool::kNone) return append_slot(header);
    append_header(header);
  }
  const std::vector<Place>& places = item_.batch->copies[item_.copy].places;
  const uint64_t most = window_ < goal_ ? goal_ : window_ + 1;  // always get somewhere
  while (left_ > 0 && window_ < most && end_ < iov_.size()) {
    if (zeros_) {
      const uint64_t bytes = std::min<uint64_t>(left_, sizeof kZeros);
      iov_[end_++] = {const_cast<std::byte*>(kZeros), bytes};
      window_ += bytes;
      left_ -= bytes;
      continue;
    }
    const Extent e = next_extent(copy, item_.cursor, std::min(left_, most - window_));
    append(places[e.pair].base + e.src_offset, e.bytes);
    left_ -= e.bytes;
  }
  in_chunk_ = left_ > 0;
}

// The whole of a chunk that was gathered: its bytes, or only where they are when the other end reads the slot too.
void Sender::append_slot(FrameHeader header) noexcept {
  const uint32_t slot = std::exchange(slot_, SlotPool::kNone);
  const uint64_t bytes = std::exchange(left_, 0);
  in_chunk_ = false;
  if (ring_ != nullptr) {
    header.type = FrameType::kSlot;
    header.body = 0;
    header.tag = uint64_t{slot} << 32 | bytes;
    append_header(header);
    gathers_.lend(slot);
    link_.through_slots.fetch_add(bytes, std::memory_order_relaxed);
    return;
  }
  append_header(header);
  slots_.push_back(slot);
  append(gathers_.pool().data(slot), bytes);
}

void Sender::push_credit(uint32_t slot) {
  FrameHeader credit;
  credit.type = FrameType::kCredit;
  credit.tag = slot;
  acks_.push_back(credit);
}

bool Sender::on_credit(uint64_t slot) noexcept {
  return ring_ != nullptr && slot <= UINT32_MAX && ring_->repaid(static_cast<uint32_t>(slot));
}

void Sender::revoke(RegionId region, const Buffer& buffer) {
  gathers_.settle();  // what is in slots is a copy already
  if (in_chunk_ && !zeros_ && slot_ == SlotPool::kNone) {
    const PagedCopy& copy = item_.batch->plan->copies[item_.copy];
    if (std::ranges::any_of(copy.pairs, [&](const RegionPair& p) { return p.src == region; })) {
      zeros_ = true;
      give_up(link_, *item_.batch, kSourceGone);
    }
  }
  const auto inside = [&](const iovec& v) {
    const auto* data = static_cast<const std::byte*>(v.iov_base);
    return data < buffer.data + buffer.bytes && data + v.iov_len > buffer.data;
  };
  uint64_t bytes = 0;
  for (size_t i = at_; i < end_; ++i) bytes += inside(iov_[i]) ? iov_[i].iov_len : 0;
  if (bytes == 0) return;
  Bytes kept(bytes);
  std::byte* to = kept.data();
  for (size_t i = at_; i < end_; ++i) {
    if (!inside(iov_[i])) continue;
    std::memcpy(to, iov_[i].iov_base, iov_[i].iov_len);
    iov_[i].iov_base = to;
    to += iov_[i].iov_len;
  }
  snapshots_.push_back(std::move(kept));
}

void Sender::close() noexcept {
  queue_.close();
  acks_.clear();
  in_plan_ = in_chunk_ = false;
  at_ = end_ = 0;
  ends_.clear();
  if (slot_ != SlotPool::kNone) slots_.push_back(std::exchange(slot_, SlotPool::kNone));
  for (const uint32_t slot : slots_) gathers_.give_back(slot);
  slots_.clear();
  gathers_.clear();
}

}  // namespace pdxfer::transport::stream
