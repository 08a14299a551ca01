// Messages of a link: numbered, sent in order over one rail, kept until the wire acknowledged them, sent again over
// another rail when theirs died (the other end drops what it has seen), bounded by credits; see rdma_link.hpp.
#include <algorithm>
#include <cstring>

#include "transport/rdma/rdma_link.hpp"

namespace pdxfer::transport::rdma {

void RdmaLink::enqueue(MessageType type, BatchId batch, std::span<const uint32_t> words,
                       std::span<const uint64_t> longs, ByteView body) {
  Pending& pending = pending_.emplace_back();
  pending.header.type = type;
  pending.header.batch = batch;
  std::ranges::copy(words, pending.header.words);
  std::ranges::copy(longs, pending.header.longs);
  pending.body.assign(body.begin(), body.end());
}

// Pairs, then runs, a message full at a time.
void RdmaLink::send_plan(const OutBatch& out, uint32_t copy_index) {
  const PagedCopy& copy = out.plan->copies[copy_index];
  const std::array<uint32_t, 3> words{copy_index, static_cast<uint32_t>(copy.pairs.size()),
                                      static_cast<uint32_t>(copy.runs.size())};
  Bytes body;
  const auto add = [&](const auto& wire) {
    if (body.size() + sizeof wire > kMessageBody) {
      enqueue(MessageType::kPlan, out.id, words, {}, body);
      body.clear();
    }
    const auto* raw = reinterpret_cast<const std::byte*>(&wire);
    body.insert(body.end(), raw, raw + sizeof wire);
  };
  for (const RegionPair& p : copy.pairs) add(WirePair{p.dst_offset, p.dst_stride, p.slot_bytes, p.dst, 0});
  for (const Run& r : copy.runs) add(WireRun{r.dst_slot, r.count});
  enqueue(MessageType::kPlan, out.id, words, {}, body);
}

void RdmaLink::send_end(OutBatch& out) {
  ByteView tail = out.given_up.ok() ? ByteView(out.tail) : ByteView{};
  for (; tail.size() > kMessageBody; tail = tail.subspan(kMessageBody))
    enqueue(MessageType::kTail, out.id, {}, {}, tail.first(kMessageBody));
  const std::array<uint32_t, 2> words{out.tag.has_value() ? 1u : 0u, static_cast<uint32_t>(out.given_up.code)};
  const std::array<uint64_t, 1> longs{out.tag.value_or(0)};
  enqueue(MessageType::kEnd, out.id, words, longs, tail);
}

// Chunks are told in the order of their slots, whichever rail was faster.
void RdmaLink::announce() {
  while (chunks_announced_ < chunks_made_) {
    Chunk& chunk = chunks_[chunks_announced_ % arena_.slots];
    if (!chunk.written) return;
    chunk.written = false;
    ++chunks_announced_;
    pending_.push_back({chunk.announcement, {}});
    pending_.back().header.type = MessageType::kChunk;
    OutBatch& out = *chunk.batch;
    --out.outstanding;
    settle(out);
  }
}

bool RdmaLink::post_message(Rail& rail) {
  const uint32_t bytes = message_bytes_[messages_posted_ % kMessageSlots];
  Work work{Work::Kind::kMessage, nullptr, messages_posted_, kArena, kNoId, 0, bytes, 1, {}};
  work.piece[0] = {reinterpret_cast<uint64_t>(arena_.message(messages_posted_)), bytes};
  const std::optional<Keys> keys = keys_for(work, rail);
  if (rail.full() || !keys || rail.post({&work, 1}, {&*keys, 1}) == 0) return false;
  ++messages_posted_;
  return true;
}

void RdmaLink::pump() {
  if (!lost_.ok() || fencing()) return;
  if (message_rail_ == nullptr || !message_rail_->up()) {
    message_rail_ = nullptr;
    for (const auto& rail : rails_)
      if (message_rail_ == nullptr && rail->up()) message_rail_ = rail.get();
    if (message_rail_ == nullptr) return;
    messages_posted_ = messages_acked_;
  }
  const auto fill = [&](MessageHeader& header, ByteView body) {
    header.sequence = static_cast<uint32_t>(messages_made_);
    header.body = static_cast<uint16_t>(body.size());
    header.consumed = told_consumed_ = consumed_;
    header.chunks_done = told_chunks_ = inbound_.chunks_done();
    std::byte* slot = arena_.message(messages_made_);
    std::memcpy(slot, &header, sizeof header);
    if (!body.empty()) std::memcpy(slot + sizeof header, body.data(), body.size());
    message_bytes_[messages_made_ % kMessageSlots] = static_cast<uint32_t>(sizeof header + body.size());
    ++messages_made_;
  };
  const auto has_slot = [&] { return messages_made_ - messages_acked_ < kMessageSlots; };
  while (!pending_.empty() && has_slot() && counted_ - their_consumed_ < kMessageWindow) {
    fill(pending_.front().header, pending_.front().body);
    pending_.pop_front();
    ++counted_;
  }
  if ((consumed_ - told_consumed_ >= kCreditEvery ||
       inbound_.chunks_done() - told_chunks_ >= std::max(1u, arena_.slots / 4)) &&
      has_slot()) {
    MessageHeader credit;
    fill(credit, {});
  }
  while (messages_posted_ < messages_made_ && post_message(*message_rail_)) {
  }
}

void RdmaLink::on_message(ByteView message) {
  if (!lost_.ok()) return;
  MessageHeader header;
  if (message.size() < sizeof header) return die({Code::kPeerLost, 0, "malformed message: too short"});
  std::memcpy(&header, message.data(), sizeof header);
  if (message.size() != sizeof header + header.body) return die({Code::kPeerLost, 0, "malformed message: its length"});
  if (header.sequence != next_expected_) {
    if (static_cast<int32_t>(header.sequence - next_expected_) > 0)
      die({Code::kPeerLost, 0, "malformed message: one is missing before it"});
    return;  // came before the rail died under its acknowledgement
  }
  ++next_expected_;
  if (header.consumed - their_consumed_ > counted_ - their_consumed_ ||
      header.chunks_done - chunks_freed_ > static_cast<uint32_t>(chunks_announced_) - chunks_freed_)
    return die({Code::kPeerLost, 0, "malformed message: credits for what was not sent"});
  their_consumed_ = header.consumed;
  chunks_freed_ = header.chunks_done;
  if (header.type == MessageType::kCredit) return;
  ++consumed_;
  if (header.type == MessageType::kAck) return on_ack(header);
  Inbound::Ended ended;
  if (const char* why = inbound_.take(header, message.subspan(sizeof header), ended))
    return die({Code::kPeerLost, 0, why});
  if (!ended.ended) return;
  if (ended.arrival) ready_.push_back(std::move(*ended.arrival));
  const std::array<uint32_t, 2> words{static_cast<uint32_t>(ended.status.code),
                                      static_cast<uint32_t>(ended.status.native)};
  enqueue(MessageType::kAck, header.batch, words, {}, {});
}

void RdmaLink::on_ack(const MessageHeader& header) {
  const auto found = batches_.find(header.batch);
  OutBatch* out = found == batches_.end() ? nullptr : found->second.get();
  const uint32_t code = header.words[0];
  if (out == nullptr || out->over || !out->end_sent || code > static_cast<uint32_t>(Code::kInternal))
    return die({Code::kPeerLost, 0, "malformed message: acknowledgement of a batch that did not end"});
  const Status acked{static_cast<Code>(code), static_cast<int32_t>(header.words[1]),
                     code == 0 ? "" : "refused by the receiver"};
  finish(*out, acked.ok() || out->given_up.ok() ? acked : out->given_up);
}

}  // namespace pdxfer::transport::rdma
