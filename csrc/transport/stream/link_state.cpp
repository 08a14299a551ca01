// Joining the streams of a link; see link_state.hpp. One lock per PLAN, END and event, none per chunk or extent.
#include "transport/stream/link_state.hpp"

#include <bit>
#include <utility>

#include "core/log.hpp"

namespace pdxfer::transport::stream {
namespace {
constexpr size_t kMaxInbound = 1 << 20;         // Config::max_batches allows no engine of ours more
constexpr uint64_t kMaxPlanBytes = 2ull << 30;  // of all unfinished plans of one link
}  // namespace

LinkState::LinkState(PeerId id, RegionTable& table, const Limits& bounds, std::function<void()> waker, uint32_t count)
    : peer(id), regions(table), limits(bounds), wake(std::move(waker)), streams(count), open_streams_(count) {}

std::shared_ptr<Inbound> LinkState::open(BatchId batch) {
  const std::lock_guard lock(mutex_);
  const auto found = inbound_.find(batch);
  if (found != inbound_.end()) return found->second;
  if (inbound_.size() >= kMaxInbound) return nullptr;
  return inbound_.emplace(batch, std::make_shared<Inbound>()).first->second;
}

void LinkState::refuse(Inbound& batch, Code code, Refusal why) {
  const std::lock_guard lock(mutex_);
  if (!batch.status.ok()) return;
  batch.status = {code, 0, refusal_text(why)};
  batch.refusal = why;
}

bool LinkState::refused(const Inbound& batch) {
  const std::lock_guard lock(mutex_);
  return !batch.status.ok();
}

const char* LinkState::end(uint32_t stream, const FrameHeader& header, Bytes tail, uint64_t received,
                           std::optional<FrameHeader>& ack) {
  const std::lock_guard lock(mutex_);
  const auto found = inbound_.find(header.batch);
  if (found == inbound_.end()) return "malformed frame: end of an unknown batch";
  Inbound& b = *found->second;
  if (header.words[1] > streams) return "malformed frame: more streams than the link has";
  if ((b.streams_ended >> stream & 1) != 0) return "malformed frame: a batch ended twice on one stream";
  if (b.streams == 0) {
    b.streams = header.words[1];
    b.announced = header.count;
  } else if (b.streams != header.words[1] || b.announced != header.count) {
    return "malformed frame: the ends of a batch disagree";
  }
  b.streams_ended |= uint64_t{1} << stream;
  b.received += received;
  if ((header.flags & kTagged) != 0) {
    b.tagged = true;
    b.tag = header.tag;
  }
  if (!tail.empty()) b.tail = std::move(tail);
  const auto code = static_cast<Code>(header.words[0]);
  if (code != Code::kOk && b.status.ok()) {
    b.status = status_from_wire(header.words[0], static_cast<uint32_t>(Refusal::kSender));
    b.refusal = Refusal::kSender;
  }
  if (static_cast<uint32_t>(std::popcount(b.streams_ended)) < b.streams) return nullptr;

  if (b.status.ok() && b.received != b.announced) {
    b.refusal = Refusal::kCount;
    b.status = {Code::kInvalid, 0, refusal_text(b.refusal)};
  }
  ack.emplace();
  ack->type = FrameType::kAck;
  ack->batch = header.batch;
  ack->words[0] = static_cast<uint32_t>(b.status.code);
  ack->words[1] = static_cast<uint32_t>(b.refusal);
  // A batch that its sender cancelled is nobody's arrival; every other tagged one is reported, good or bad.
  if (b.tagged && b.status.code != Code::kCancelled) {
    LinkEvent event;
    event.kind = LinkEvent::Kind::kArrived;
    event.arrival.kind = Completion::Kind::kArrived;
    event.arrival.peer = peer;
    event.arrival.batch = header.batch;
    event.arrival.tag = b.tag;
    event.arrival.status = b.status;
    if (b.status.ok()) event.arrival.tail = std::move(b.tail);
    events_.push_back(std::move(event));
    has_events_.store(true, std::memory_order_release);
  }
  inbound_.erase(found);
  return nullptr;
}

bool LinkState::reserve_plan(uint64_t bytes) noexcept {
  if (plan_bytes_.fetch_add(bytes) + bytes <= kMaxPlanBytes) return true;
  plan_bytes_.fetch_sub(bytes);
  return false;
}

void LinkState::release_plan(uint64_t bytes) noexcept { plan_bytes_.fetch_sub(bytes); }

void LinkState::post(LinkEvent event) {
  {
    const std::lock_guard lock(mutex_);
    events_.push_back(std::move(event));
    has_events_.store(true, std::memory_order_release);
  }
  wake();
}

void LinkState::note(std::string text) {
  const std::lock_guard lock(mutex_);
  if (text == noted_) return;
  log(LogLevel::kWarning, "peer " + std::to_string(peer) + ": " + text);
  noted_ = std::move(text);
}

std::string LinkState::noted() const {
  const std::lock_guard lock(mutex_);
  return noted_;
}

bool LinkState::take_events(std::vector<LinkEvent>& out) {
  out.clear();
  if (!has_events_.load(std::memory_order_acquire)) return false;
  const std::lock_guard lock(mutex_);
  has_events_.store(false, std::memory_order_release);
  out.swap(events_);
  return !out.empty();
}

void LinkState::fail(Status status) {
  const std::lock_guard lock(mutex_);
  if (!failure_.ok()) return;
  failure_ = status;
  failed_.store(true, std::memory_order_release);
}

Status LinkState::failure() const {
  const std::lock_guard lock(mutex_);
  return failure_;
}

void LinkState::stream_closed() {
  if (open_streams_.fetch_sub(1) != 1) return;
  const Status why = failure();
  {
    const std::lock_guard lock(mutex_);
    for (auto& [id, batch] : inbound_) {
      if (!batch->tagged || batch->status.code == Code::kCancelled) continue;
      LinkEvent event;
      event.kind = LinkEvent::Kind::kArrived;
      event.arrival.kind = Completion::Kind::kArrived;
      event.arrival.peer = peer;
      event.arrival.batch = id;
      event.arrival.tag = batch->tag;
      event.arrival.status = why;
      events_.push_back(std::move(event));
    }
    inbound_.clear();
    has_events_.store(true, std::memory_order_release);
  }
  wake();
}

}  // namespace pdxfer::transport::stream
