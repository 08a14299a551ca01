// Submitting to streams and completing batches; see stream_peer.hpp.
#include "transport/stream/stream_peer.hpp"

#include <algorithm>
#include <bit>
#include <utility>

#include "transport/check_copy.hpp"

namespace pdxfer::transport::stream {
namespace {
// A batch up to this size goes over one stream: a second one costs another PLAN, END and system call each.
constexpr uint64_t kSmall = 256 << 10;
constexpr uint64_t kLeastPiece = 128 << 10;
constexpr uint64_t kSharedPieces = 8;
constexpr uint64_t kLeastShared = 512 << 10;

// Of a batch of `total` bytes, `begun` of which are on their way, the next piece to go through a shared slot. Large, as
// each costs two launches; small at either end of the batch, when one GPU waits for the other.
uint64_t shared_piece(uint64_t total, uint64_t begun) noexcept {
  const uint64_t left = total - std::min(begun, total);
  return std::max(std::min({total / kSharedPieces, begun, left / 2}), kLeastShared);
}
}  // namespace

StreamPeer::StreamPeer(StreamHub& hub, PeerId id, std::vector<std::unique_ptr<Channel>> channels,
                       std::string description, std::unique_ptr<SlotRing> ring)
    : hub_(hub),
      link_(id, hub.regions_, hub.limits_, hub.wake_, static_cast<uint32_t>(channels.size())),
      description_(std::move(description)) {
  for (uint32_t i = 0; i < channels.size(); ++i) {
    StreamHub::Driver& driver = hub_.drivers_[i % hub_.drivers_.size()];
    streams_.push_back(std::make_unique<Stream>(
        link_, std::move(channels[i]), *driver.loop, *driver.lane, i, [this] { kick_all(); }, std::move(ring)));
  }
}

StreamPeer::~StreamPeer() {
  // Off the loops first: while the hub knows us, deregister_memory still reaches every stream that moves.
  for (auto& stream : streams_) {
    stream->loop().remove(stream->channel().wait_fd(), *stream);
    stream->loop().run([&] { stream->release(); });  // the lane is its thread's
  }
  hub_.forget(this);
  for (auto& stream : streams_) stream->channel().shutdown();
}

void StreamPeer::start() {
  for (auto& stream : streams_) stream->loop().add(stream->channel().wait_fd(), *stream);
  kick_all();  // bytes may have come before the poller watched
}

void StreamPeer::kick_all() noexcept {
  for (auto& stream : streams_) stream->loop().kick(*stream);
}

void StreamPeer::revoke(const IoLoop& loop, RegionId region, const Buffer& buffer) {
  for (auto& stream : streams_)
    if (&stream->loop() == &loop) stream->revoke(region, buffer);
}

void StreamPeer::import_region(const Region& region, ByteView) { imported_[region.id] = region.buffer.bytes; }
void StreamPeer::forget_region(RegionId region) { imported_.erase(region); }
Status StreamPeer::lost() const { return link_.failed() ? link_.failure() : kOkStatus; }

std::string StreamPeer::describe() const {
  const std::string noted = link_.noted();
  const uint64_t slots = link_.through_slots.load(std::memory_order_relaxed);
  return description_ + (slots == 0 ? "" : "; " + std::to_string(slots >> 20) + " MiB sent in shared slots") +
         (noted.empty() ? "" : "; " + noted);
}

StreamPeer::Entry& StreamPeer::open(BatchId batch, const TransferPlan* plan) {
  Entry& entry = batches_[batch];
  if (entry.out == nullptr) {
    entry.out = std::make_unique<Outbound>(batch, plan);
    entry.total = plan == nullptr ? 0 : plan->bytes();
    entry.home = rotate_++ % static_cast<uint32_t>(streams_.size());
  }
  return entry;
}

// Is there nothing more to do for the batch? On a link that died its completion is on the way, or made here.
bool StreamPeer::closed_to(Outbound& out, Status& why) {
  why = out.given_up.ok() && link_.failed() ? link_.failure() : out.given_up;
  if (dead_) finish(out, why);
  return out.over || out.ended || !why.ok();
}

// Everything that may be wrong with a piece, before any of it is promised; O(pairs) when a region went, else O(1).
Status StreamPeer::check(Outbound& out, uint32_t copy_index, const Cursor& cursor) {
  if (copy_index >= out.copies.size()) return {Code::kInvalid, 0, "no such copy in the plan"};
  const PagedCopy& copy = out.plan->copies[copy_index];
  Outbound::CopyState& state = out.copies[copy_index];
  const uint64_t epoch = link_.regions.epoch();
  if (state.epoch != epoch) {
    if (copy_index >= kMaxCopies || copy.pairs.size() > kMaxPairs || copy.runs.size() > kMaxRuns)
      return {Code::kInvalid, 0, "copy with too many pairs or runs"};
    if (const Status s = check_sealed(copy); !s.ok()) return s;
    const auto mine = [&](RegionId id) { return link_.regions.find(id).bytes; };
    const auto theirs = [&](RegionId id) {
      const auto found = imported_.find(id);
      return found == imported_.end() ? uint64_t{0} : found->second;
    };
    if (const Status s = check_range(copy, Side::kSrc, mine); !s.ok()) return s;
    if (state.places.empty()) {
      if (const Status s = check_range(copy, Side::kDst, theirs); !s.ok()) return s;
      state.number = next_number();
      for (const RegionPair& p : copy.pairs) {
        const Buffer buffer = link_.regions.find(p.src);
        state.places.push_back({buffer.data, buffer.device});
      }
    }
    state.epoch = epoch;
  }
  return inside(copy, cursor) ? kOkStatus : Status{Code::kInvalid, 0, "cursor outside its copy"};
}

// The stream for the next piece, or the number of streams when none has room.
uint32_t StreamPeer::choose(const Entry& entry) {
  const auto count = static_cast<uint32_t>(streams_.size());
  if (entry.total <= kSmall) return streams_[entry.home]->queue().load() == UINT64_MAX ? count : entry.home;
  uint32_t best = count;
  uint64_t least = UINT64_MAX;
  for (uint32_t i = 0; i < count && least > 0; ++i) {
    const uint32_t stream = (entry.home + i) % count;
    const uint64_t load = streams_[stream]->queue().load();
    if (load >= least) continue;
    least = load;
    best = stream;
  }
  return best;
}

Status StreamPeer::submit(BatchId batch, const TransferPlan& plan, uint32_t copy_index, Cursor& cursor) {
  Entry& entry = open(batch, &plan);
  Outbound& out = *entry.out;
  Status why;
  if (closed_to(out, why)) return why.ok() ? Status{Code::kInvalid, 0, "the batch was ended before"} : why;
  if (copy_index < plan.copies.size() && at_end(plan.copies[copy_index], cursor)) return kOkStatus;
  if (const Status s = check(out, copy_index, cursor); !s.ok()) return give_up(entry, s);
  const uint32_t stream = choose(entry);
  if (stream == streams_.size()) return kOkStatus;

  const uint64_t spread = entry.total / (2 * streams_.size());
  uint64_t piece = std::min(link_.limits.chunk_bytes, std::max(kLeastPiece, spread));
  const uint64_t bit = uint64_t{1} << stream;
  Outbound::CopyState& state = out.copies[copy_index];
  const int device = state.places[cursor.pair].device;
  if (device != kHost && streams_[stream]->shares_slots())
    piece = std::min(link_.limits.device_chunk_bytes, shared_piece(entry.total, out.bytes));
  if (device != kHost) piece = std::min(piece, streams_[stream]->slot_bytes());
  SendItem item{&out, 0, cursor, state.epoch, copy_index, (state.planned & bit) == 0, device};
  Cursor after = cursor;
  item.bytes = advance(plan.copies[copy_index], after, piece, same_device_end(state.places, cursor.pair));
  if (!streams_[stream]->queue().push(item)) return lost();  // closed under us; its kSent follows
  state.planned |= bit;
  out.streams |= bit;
  out.bytes += item.bytes;
  cursor = after;
  streams_[stream]->loop().kick(*streams_[stream]);
  return kOkStatus;
}

bool StreamPeer::notify(BatchId batch, std::optional<uint64_t> tag, ByteView tail) {
  Entry& entry = open(batch, nullptr);
  Outbound& out = *entry.out;
  Status why;
  if (closed_to(out, why)) return true;
  if (tail.size() > link_.limits.max_tail_bytes) {
    give_up(entry, {Code::kInvalid, 0, "tail larger than the limit"});
    return true;
  }
  out.tag = tag;
  out.tail.assign(tail.begin(), tail.end());
  end(entry);
  return true;
}

void StreamPeer::cancel(BatchId batch) {
  Entry& entry = open(batch, nullptr);
  if (entry.out->over || !entry.out->given_up.ok()) return;
  const Status why{Code::kCancelled, 0, "cancelled by the sender"};
  if (dead_)
    finish(*entry.out, why);
  else
    give_up(entry, why);
}

// An END behind the last piece on every stream that was used; the acknowledgement completes the batch.
void StreamPeer::end(Entry& entry) {
  Outbound& out = *entry.out;
  if (out.streams == 0) out.streams = uint64_t{1} << entry.home;
  out.ended = true;
  out.ends_left = static_cast<uint32_t>(std::popcount(out.streams));
  for (uint32_t i = 0; i < streams_.size(); ++i) {
    if ((out.streams >> i & 1) == 0) continue;
    streams_[i]->queue().push({&out, 0, {}, 0, 0, false, kHost});
    streams_[i]->loop().kick(*streams_[i]);
  }
}

Status StreamPeer::give_up(Entry& entry, Status why) {
  Outbound& out = *entry.out;
  if (out.over || !out.given_up.ok()) return out.given_up;
  out.given_up = why;
  int32_t none = 0;
  out.stop.compare_exchange_strong(none, static_cast<int32_t>(why.code));
  if (out.ended) return why;
  if (out.streams == 0)
    finish(out, why);
  else
    end(entry);
  return why;
}

void StreamPeer::finish(Outbound& out, Status status) {
  if (std::exchange(out.over, true)) return;
  if (out.given_up.ok()) out.given_up = status;
  Completion sent;
  sent.peer = link_.peer;
  sent.batch = out.id;
  sent.tag = out.tag.value_or(0);
  sent.status = status;
  ready_.push_back(std::move(sent));
  if (link_.wake) link_.wake();
}

void StreamPeer::on_ack(BatchId batch, const Status& status) {
  const auto found = batches_.find(batch);
  Outbound* out = found == batches_.end() ? nullptr : found->second.out.get();
  if (out == nullptr || out->over || !out->ended || out->acked.has_value()) {
    link_.fail({Code::kPeerLost, 0, "malformed frame: acknowledgement of a batch that did not end"});
    kick_all();
    return;
  }
  out->acked = status;
  if (out->ends_left.fetch_or(Outbound::kAcked, std::memory_order_acq_rel) == 0) on_flushed(*out);
}

// Acknowledged, and no io thread holds anything of it.
void StreamPeer::on_flushed(Outbound& out) {
  finish(out, out.acked->ok() || out.given_up.ok() ? *out.acked : out.given_up);
}

void StreamPeer::take_events() {
  // In this order: what was acknowledged before the last stream closed counts.
  const bool closed = link_.all_closed();
  if (link_.take_events(events_)) {
    for (LinkEvent& event : events_) {
      if (event.kind == LinkEvent::Kind::kArrived) {
        ready_.push_back(std::move(event.arrival));
        continue;
      }
      if (event.kind == LinkEvent::Kind::kAcked) {
        on_ack(event.batch, event.status);
        continue;
      }
      const auto found = batches_.find(event.batch);
      if (found == batches_.end()) continue;
      if (event.kind == LinkEvent::Kind::kFlushed)
        on_flushed(*found->second.out);
      else
        give_up(found->second, event.status);
    }
  }
  if (!closed || std::exchange(dead_, true)) return;
  for (auto& [id, entry] : batches_) finish(*entry.out, link_.failure());
}

size_t StreamPeer::poll(std::span<Completion> out) {
  take_events();
  size_t n = 0;
  for (; n < out.size() && !ready_.empty(); ready_.pop_front()) {
    out[n] = std::move(ready_.front());
    if (out[n].kind == Completion::Kind::kSent) batches_.erase(out[n].batch);
    ++n;
  }
  return n;
}

}  // namespace pdxfer::transport::stream
