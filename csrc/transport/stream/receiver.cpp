// Checking and placing what arrives; see receiver.hpp. Every length was bounded by decode_header before it is used
// here, and memory grows only as bytes really arrive.
#include "transport/stream/receiver.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "transport/check_copy.hpp"
#include "transport/stream/small_extents.hpp"

namespace pdxfer::transport::stream {
namespace {
constexpr size_t kScratch = 64 << 10;
constexpr size_t kSinkEntries = 16;  // times kScratch: what one read may throw away
}  // namespace

Receiver::Receiver(LinkState& link, Channel& channel, Sender& acks, uint32_t index, DeviceLane& lane, SlotRing* ring)
    : link_(link),
      channel_(channel),
      acks_(acks),
      index_(index),
      ring_(ring),
      scatters_(link, lane, ring),
      scratch_(kScratch) {}

bool Receiver::turn_away(const char* why) noexcept {
  malformed_ = why;
  return false;
}

int Receiver::pump(uint64_t budget, bool& moved) {
  for (uint64_t done = 0; done < budget;) {
    if (!finish_scatters(moved)) return -EPROTO;
    const int64_t n = read_some();
    if (n == 0) flush_slot(false);
    if (n <= 0) return static_cast<int>(n);
    moved = true;
    done += static_cast<uint64_t>(n);
    // A header may have come with the payload before it, and a frame may have no body: see how far we are.
    while (stage_ == Stage::kHeader && header_have_ == kHeaderBytes)
      if (!on_header()) return -EPROTO;
  }
  return 1;
}

// One read of what the frame under way wants next.
int64_t Receiver::read_some() {
  if (stage_ == Stage::kPayload) {
    if (at_ == end_) fill();
    if (at_ == end_) return 0;  // no slot
    const iovec packed{packing_ ? packed_.data() : nullptr, std::min<uint64_t>(kPackBytes, window_)};
    const int64_t n = packing_ ? channel_.readv({&packed, 1}) : channel_.readv({iov_.data() + at_, end_ - at_});
    if (n > 0) consume(static_cast<uint64_t>(n), static_cast<const std::byte*>(packed.iov_base));
    return n;
  }
  iovec to{};
  if (stage_ == Stage::kHeader) to = {header_bytes_.data() + header_have_, kHeaderBytes - header_have_};
  if (stage_ == Stage::kTail) to = {tail_.data() + tail_.size() - unread_, unread_};
  if (stage_ == Stage::kPlan)
    to = {scratch_.data() + scratch_have_, std::min<uint64_t>(unread_, kScratch - scratch_have_)};
  const int64_t n = channel_.readv({&to, 1});
  if (n <= 0) return n;
  const auto bytes = static_cast<size_t>(n);
  if (stage_ == Stage::kHeader) {
    header_have_ += bytes;
    return n;
  }
  unread_ -= bytes;
  if (stage_ == Stage::kPlan) {
    parse_plan(bytes);
    if (unread_ == 0) finish_plan();
  } else if (unread_ == 0 && !finish_end()) {
    return -EPROTO;
  }
  return n;
}

bool Receiver::on_header() {
  header_have_ = 0;
  if (const char* why = decode_header(header_bytes_.data(), link_.limits.max_tail_bytes, header_))
    return turn_away(why);
  unread_ = header_.body;
  switch (header_.type) {
    case FrameType::kPlan:
      return begin_plan();
    case FrameType::kChunk:
      return begin_chunk();
    case FrameType::kEnd:
      tail_.assign(header_.body, std::byte{});
      stage_ = Stage::kTail;
      return unread_ != 0 || finish_end();
    case FrameType::kSlot:
      return take_slot();
    case FrameType::kCredit:
      return acks_.on_credit(header_.tag) || turn_away("malformed frame: credit for a slot that was not lent");
    case FrameType::kAck:
      link_.post({LinkEvent::Kind::kAcked, header_.batch, status_from_wire(header_.words[0], header_.words[1]), {}});
      return true;
  }
  return turn_away("malformed frame: unknown type");
}

InboundBatch* Receiver::open(BatchId id) {
  InboundBatch& batch = batches_[id];
  if (batch.shared == nullptr) batch.shared = link_.open(id);
  if (batch.ended) {
    turn_away("malformed frame: a batch goes on after its end");
    return nullptr;
  }
  if (batch.shared != nullptr) return &batch;
  batches_.erase(id);
  turn_away("too many unfinished batches");
  return nullptr;
}

bool Receiver::begin_plan() {
  batch_ = open(header_.batch);
  if (batch_ == nullptr) return false;
  if (batch_->find(header_.copy) != nullptr) return turn_away("malformed frame: a second plan for one copy");
  auto plan = std::make_unique<InboundPlan>(link_);
  const uint64_t memory = header_.words[0] * (sizeof(RegionPair) + sizeof(Place)) + header_.words[1] * sizeof(Run);
  if (link_.reserve_plan(memory)) {
    plan->reserved = memory;
  } else {
    plan->sink = true;
    link_.refuse(*batch_->shared, Code::kUnavailable, Refusal::kCrowded);
  }
  plan_ = plan.get();
  batch_->plans.emplace_back(header_.copy, std::move(plan));
  scratch_have_ = 0;
  stage_ = Stage::kPlan;
  return true;
}

// Pairs, then runs, as they come; what is cut in the middle waits at the front of scratch_ for its rest.
void Receiver::parse_plan(size_t bytes) {
  scratch_have_ += bytes;
  size_t at = 0;
  PagedCopy& copy = plan_->copy;
  if (plan_->sink) at = scratch_have_;
  for (; copy.pairs.size() < header_.words[0] && at + sizeof(WirePair) <= scratch_have_; at += sizeof(WirePair)) {
    WirePair wire;
    std::memcpy(&wire, scratch_.data() + at, sizeof wire);
    copy.pairs.push_back(from_wire(wire));
  }
  for (; copy.pairs.size() == header_.words[0] && at + sizeof(WireRun) <= scratch_have_; at += sizeof(WireRun)) {
    WireRun wire;
    std::memcpy(&wire, scratch_.data() + at, sizeof wire);
    copy.runs.push_back(from_wire(wire));
  }
  std::memmove(scratch_.data(), scratch_.data() + at, scratch_have_ - at);
  scratch_have_ -= at;
}

// The whole plan is here: nothing of it is used before all of it was found good.
void Receiver::finish_plan() {
  stage_ = Stage::kHeader;
  if (plan_->sink) return;
  PagedCopy& copy = plan_->copy;
  copy.seal();
  Refusal why = check_sealed(copy).ok() ? Refusal::kNone : Refusal::kPlan;
  std::vector<uint64_t> sizes;
  for (const RegionPair& p : copy.pairs) {
    const Buffer buffer = link_.regions.find(p.dst);
    plan_->places.push_back({buffer.data, buffer.device});
    sizes.push_back(buffer.bytes);
    if (buffer.data == nullptr && why == Refusal::kNone) why = Refusal::kUnknownRegion;
  }
  size_t next = 0;  // check_range asks once per pair, in order
  if (why == Refusal::kNone && !check_range(copy, Side::kDst, [&](RegionId) { return sizes[next++]; }).ok())
    why = Refusal::kRange;
  if (why == Refusal::kNone) return;
  plan_->sink = true;
  copy = PagedCopy{};
  link_.refuse(*batch_->shared, Code::kInvalid, why);
}

// The batch and the plan of a CHUNK or SLOT, and where in the plan it begins; sink_ when it lands nowhere.
bool Receiver::find_place() {
  const auto found = batches_.find(header_.batch);
  if (found == batches_.end()) return turn_away("malformed frame: chunk of an unknown batch");
  batch_ = &found->second;
  if (batch_->ended) return turn_away("malformed frame: a batch goes on after its end");
  plan_ = batch_->find(header_.copy);
  if (plan_ == nullptr) return turn_away("malformed frame: chunk without a plan");
  cursor_ = {header_.words[0], header_.words[1], header_.words[2], header_.count};
  sink_ = plan_->sink || link_.refused(*batch_->shared);
  if (!sink_ && !inside(plan_->copy, cursor_)) {
    link_.refuse(*batch_->shared, Code::kInvalid, Refusal::kChunk);
    sink_ = true;
  }
  return true;
}

bool Receiver::begin_chunk() {
  if (!find_place()) return false;
  unfilled_ = unread_;
  at_ = end_ = 0;
  stage_ = Stage::kPayload;
  return true;
}

// A chunk whose bytes lie in a slot of the other end's ring: GPUs read it where it is; pages of host memory are filled
// from it here. It goes back when nothing reads it any more.
bool Receiver::take_slot() {
  const auto slot = static_cast<uint32_t>(header_.tag >> 32);
  const uint64_t bytes = header_.tag & UINT32_MAX;
  if (ring_ == nullptr || !ring_->borrow(slot, bytes)) return turn_away("malformed frame: no such slot to be had");
  if (!find_place()) return false;
  for (uint64_t at = 0; at < bytes && !sink_;) at += place_from_slot(slot, at, bytes - at);
  batch_->received += bytes;
  scatters_.let_go(slot);
  return_slots();
  return true;
}

// What goes to one device, or to host memory; the bytes placed.
uint64_t Receiver::place_from_slot(uint32_t slot, uint64_t at, uint64_t bytes) {
  const PagedCopy& copy = plan_->copy;
  if (at_end(copy, cursor_)) {
    link_.refuse(*batch_->shared, Code::kInvalid, Refusal::kChunk);
    sink_ = true;
    return bytes;
  }
  const Place& place = plan_->places[cursor_.pair];
  const uint32_t stop = same_device_end(plan_->places, cursor_.pair);
  if (place.device != kHost) {
    const Cursor from = cursor_;
    sink_ = !scatters_.open(*batch_, place.device, true);
    if (sink_) return bytes;
    const uint64_t placed = advance(copy, cursor_, bytes, stop);
    scatters_.add_from_ring(*batch_, *plan_, from, placed, slot, at);
    return placed;
  }
  uint64_t placed = 0;
  while (placed < bytes && cursor_.pair < stop && !at_end(copy, cursor_)) {
    const Extent e = next_extent(copy, cursor_, bytes - placed);
    std::memcpy(plan_->places[e.pair].base + e.dst_offset, ring_->incoming(slot) + at + placed, e.bytes);
    placed += e.bytes;
  }
  return placed;
}

void Receiver::return_slots() {
  for (const uint32_t slot : scatters_.returned()) acks_.push_credit(slot);
  scatters_.returned().clear();
}

void Receiver::fill() {
  at_ = end_ = 0;
  packing_ = starved_ = false;
  const uint64_t before = unfilled_;
  if (!sink_ && at_end(plan_->copy, cursor_)) {  // the chunk is longer than the rest of its copy
    link_.refuse(*batch_->shared, Code::kInvalid, Refusal::kChunk);
    sink_ = true;
  }
  const int device = sink_ ? kHost : plan_->places[cursor_.pair].device;
  if (device != kHost && !scatters_.open(*batch_, device, false)) sink_ = true;
  if (!sink_ && device != kHost) {
    fill_slot();
    if (slot_ == SlotPool::kNone) return;
  } else if (!sink_) {
    fill_host();
  }
  for (size_t i = 0; sink_ && unfilled_ > 0 && i < kSinkEntries && end_ < iov_.size(); ++i) {
    const uint64_t bytes = std::min<uint64_t>(unfilled_, kScratch);
    iov_[end_++] = {scratch_.data(), bytes};
    unfilled_ -= bytes;
  }
  window_ = before - unfilled_;
  packing_ = !sink_ && slot_ == SlotPool::kNone && worth_packing(window_, end_, kSmallReceived);
  // The next header rides along: in the steady state a chunk needs no read of its own for it.
  if (unfilled_ == 0 && end_ < iov_.size()) {
    iov_[end_++] = {header_bytes_.data(), kHeaderBytes};
    window_ += kHeaderBytes;
  }
}

void Receiver::fill_host() {
  const std::vector<Place>& places = plan_->places;
  while (unfilled_ > 0 && end_ < iov_.size() && !at_end(plan_->copy, cursor_) && places[cursor_.pair].device == kHost) {
    const Extent e = next_extent(plan_->copy, cursor_, unfilled_);
    std::byte* const to = places[e.pair].base + e.dst_offset;
    unfilled_ -= e.bytes;
    if (end_ > 0 && static_cast<std::byte*>(iov_[end_ - 1].iov_base) + iov_[end_ - 1].iov_len == to)
      iov_[end_ - 1].iov_len += e.bytes;
    else
      iov_[end_++] = {to, e.bytes};
  }
}

void Receiver::fill_slot() {
  slot_ = scatters_.take();
  starved_ = slot_ == SlotPool::kNone;
  if (starved_) return;
  slot_cursor_ = cursor_;
  slot_have_ = 0;
  slot_size_ = advance(plan_->copy, cursor_, std::min(unfilled_, scatters_.slot_bytes()),
                       same_device_end(plan_->places, cursor_.pair));
  unfilled_ -= slot_size_;
  iov_[end_++] = {scatters_.data(slot_), slot_size_};
}

// Hands what the slot holds to the GPU. Without `all`, the channel is empty: a slot is then not kept for bytes that may
// come late or never, but while pieces are under way more is collected, so that a slow wire makes no tiny pieces.
void Receiver::flush_slot(bool all) {
  if (slot_ == SlotPool::kNone || (!all && !scatters_.empty())) return;
  const uint32_t slot = std::exchange(slot_, SlotPool::kNone);
  if (slot_have_ == 0)
    scatters_.give_back(slot);
  else
    scatters_.add(*batch_, *plan_, slot_cursor_, slot_have_, slot);
  if (all) return;
  cursor_ = slot_cursor_;
  advance(plan_->copy, cursor_, slot_have_);
  unfilled_ += slot_size_ - slot_have_;
  at_ = end_ = 0;
}

void Receiver::drop_slot() noexcept {
  if (slot_ != SlotPool::kNone) scatters_.give_back(std::exchange(slot_, SlotPool::kNone));
}

// Batches whose last scatter is over and whose END came before it. `moved` becomes true when a scatter was over.
bool Receiver::finish_scatters(bool& moved) {
  if (scatters_.empty()) return true;
  ended_.clear();
  moved |= scatters_.progress(ended_);
  return_slots();
  return std::ranges::all_of(ended_, [&](InboundBatch* batch) { return end(*batch); });
}

void Receiver::consume(uint64_t bytes, const std::byte* packed) {
  if (packed != nullptr) {
    at_ += scatter({iov_.data() + at_, end_ - at_}, packed, bytes);
  } else {
    for (uint64_t left = bytes; left > 0;) {
      iovec& first = iov_[at_];
      const uint64_t step = std::min<uint64_t>(left, first.iov_len);
      first.iov_base = static_cast<std::byte*>(first.iov_base) + step;
      first.iov_len -= step;
      left -= step;
      if (first.iov_len == 0) ++at_;
    }
  }
  window_ -= bytes;
  const uint64_t payload = std::min(bytes, unread_);
  unread_ -= payload;
  if (slot_ != SlotPool::kNone) {
    slot_have_ += std::min(bytes, slot_size_ - slot_have_);
    if (slot_have_ == slot_size_) flush_slot(true);
  }
  if (unread_ > 0) return;
  header_have_ = bytes - payload;
  batch_->received += header_.body;
  at_ = end_ = 0;
  stage_ = Stage::kHeader;
}

bool Receiver::finish_end() {
  stage_ = Stage::kHeader;
  InboundBatch* const batch = open(header_.batch);
  if (batch == nullptr) return false;
  batch->ended = true;
  batch->end = header_;
  batch->tail = std::exchange(tail_, {});
  return batch->scatters > 0 || end(*batch);
}

// Everything of the batch on this stream is in place.
bool Receiver::end(InboundBatch& batch) {
  for (const auto& [copy, plan] : batch.plans) scatters_.release(*plan);
  const FrameHeader header = batch.end;
  const uint64_t received = batch.received;
  Bytes tail = std::move(batch.tail);
  batches_.erase(header.batch);
  std::optional<FrameHeader> ack;
  if (const char* why = link_.end(index_, header, std::move(tail), received, ack)) return turn_away(why);
  if (!ack.has_value()) return true;
  acks_.push_ack(*ack);
  link_.wake();
  return true;
}

void Receiver::revoke(RegionId region) {
  for (auto& [id, batch] : batches_)
    for (auto& [copy, plan] : batch.plans) {
      if (plan->sink || plan->places.empty()) continue;  // one still being read is checked when it is complete
      if (std::ranges::none_of(plan->copy.pairs, [&](const RegionPair& p) { return p.dst == region; })) continue;
      plan->sink = true;
      scatters_.settle(plan.get());
      link_.refuse(*batch.shared, Code::kInvalid, Refusal::kDeregistered);
      if (stage_ != Stage::kPayload || plan.get() != plan_) continue;
      drop_slot();
      sink_ = true;
      unfilled_ = unread_;
      at_ = end_ = 0;
      packing_ = false;
    }
}

void Receiver::close() noexcept {
  drop_slot();
  scatters_.settle(nullptr);
  for (auto& [id, batch] : batches_)
    for (const auto& [copy, plan] : batch.plans) scatters_.release(*plan);
  batches_.clear();
  stage_ = Stage::kHeader;
  header_have_ = 0;
}

}  // namespace pdxfer::transport::stream
