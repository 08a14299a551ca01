// Rails of a link: how they fail, are fenced at both ends, come back and are found to work; and the end of the link.
//
// A rail fails where its completion says so (or its port, or the other end). Each end then destroys its queue pair and
// tells the other once (kDown); when both have, nothing of it can land any more and its work goes to other rails. The
// connecting end offers a new queue pair (kOffer, kAnswer, kReady), and a zero-length write of each end proves it.
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "core/log.hpp"
#include "transport/rdma/rdma_link.hpp"

namespace pdxfer::transport::rdma {
namespace {

constexpr auto kFirstBackoff = std::chrono::milliseconds(50);
constexpr uint32_t kMostStrikes = 3;
constexpr uint32_t kMostDoublings = 5;  // 1.6 s

// The request itself was wrong, and not the way: the memory behind it went away, at one of the ends.
bool request_fault(int status) noexcept {
  return status == shim::kIbvWcLocLenErr || status == shim::kIbvWcLocProtErr || status == shim::kIbvWcLocAccessErr ||
         status == shim::kIbvWcRemInvReqErr || status == shim::kIbvWcRemAccessErr || status == shim::kIbvWcRemOpErr;
}

}  // namespace

bool RdmaLink::fencing() const noexcept {
  return !doomed_.empty() ||
         std::ranges::any_of(rails_, [](const auto& rail) { return rail->fenced_here && !rail->fenced_there; });
}

bool RdmaLink::usable() const noexcept {
  return std::ranges::any_of(rails_, [](const auto& rail) { return rail->up(); });
}

Status RdmaLink::why_down() const {
  for (const auto& rail : rails_)
    if (!rail->why.ok()) return rail->why;
  return {Code::kUnavailable, 0, "no probe was answered"};
}

void RdmaLink::on_completion(Rail& rail, const shim::IbvWc& wc) {
  if (!lost_.ok()) return;
  if (wc.status == shim::kIbvWcSuccess) {
    rail.retire(wc.wr_id, [&](const Work& work) {
      if (work.kind != Work::Kind::kProbe) return work_done(work);
      if (rail.state != Rail::State::kProbing) return;
      rail.state = Rail::State::kUp;
      rail.failures = 0;
      hub_.wake();
    });
    return;
  }
  const Work* failed = rail.failed(wc.wr_id);
  if (failed == nullptr) return;
  // Also on a rail that the other end gave up first: sent again, the request would fail there for ever.
  if (failed->kind == Work::Kind::kExtent && request_fault(wc.status))
    give_up(*failed->batch, {Code::kInvalid, wc.status,
                             wc.status == shim::kIbvWcRemAccessErr || wc.status == shim::kIbvWcRemInvReqErr
                                 ? "a destination region was deregistered"
                                 : "a source region was deregistered",
                             hub_.api.wc_status_str(wc.status)});
  doom(rail, {Code::kPeerLost, wc.status, "an RDMA request", hub_.api.wc_status_str(wc.status)});
}

void RdmaLink::doom(Rail& rail, Status why) {
  if (rail.state == Rail::State::kDown) return;
  rail.state = Rail::State::kDown;
  rail.why = why;
  rail.retry_at = Clock::now();
  if (rail.failures > 0) rail.retry_at += kFirstBackoff * (1 << std::min(rail.failures, kMostDoublings));
  ++rail.failures;
  ++failovers_;
  doomed_.push_back(&rail);
}

void RdmaLink::tear_down(Rail& rail) {
  std::erase(doomed_, &rail);
  rail.fence();
  hub_.drain();  // what came over it counts
  rail.close();
  if (message_rail_ == &rail) message_rail_ = nullptr;
  if (rail.has_real_work() && fruitless_since_ == Clock::time_point{}) fruitless_since_ = Clock::now();
  std::vector<OutBatch*> dropped;
  // Whose request stood first when a queue pair broke, though packets get through, is the suspect; not where a message
  // found no receive buffer, which no write needs.
  bool suspect = rail.why.native != shim::kIbvWcRetryExcErr && rail.why.native != shim::kIbvWcRnrRetryExcErr &&
                 !rail.port.dead.load();
  rail.take_unfinished([&](const Work& work) {
    if (work.kind == Work::Kind::kExtent && std::exchange(suspect, false) && ++work.batch->strikes == kMostStrikes)
      give_up(*work.batch, {Code::kInvalid, rail.why.native, "its requests broke one queue pair after another",
                            rail.why.native_name});
    if (work.kind == Work::Kind::kChunk) retry_.push_back(work);
    if (work.kind != Work::Kind::kExtent) return;
    if (work.batch->given_up.ok()) {
      retry_.push_back(work);
    } else {
      --work.batch->outstanding;
      dropped.push_back(work.batch);
    }
  });
  rail.fenced_here = true;
  rail.since = Clock::now();
  if (!lost_.ok()) return;
  send_frame(FrameType::kDown, rail);
  for (OutBatch* out : dropped) settle(*out);
  log(LogLevel::kInfo, "rdma: queue pair " + std::to_string(rail.index) + " (" + rail.pair.why +
                           ") failed: " + rail.why.to_string() + "; its work goes to the others");
}

void RdmaLink::probe(Rail& rail) {
  rail.state = Rail::State::kProbing;
  Work work;
  work.dst = kStaging;
  work.remote = theirs_.staging;
  const std::optional<Keys> keys = keys_for(work, rail);
  if (!keys || rail.post({&work, 1}, {&*keys, 1}) == 0)
    doom(rail, {Code::kUnavailable, 0, "ibv_post_send refused a probe"});
}

// With an offer: the other end's new queue pair is answered; without, ours is offered.
void RdmaLink::reopen(Rail& rail, const Frame* offer) {
  try {
    if (offer != nullptr) rail.generation = offer->generation - 1;
    const QpAddress mine = rail.open();
    if (offer != nullptr) rail.connect(offer->qp);
    send_frame(offer != nullptr ? FrameType::kAnswer : FrameType::kOffer, rail, mine);
  } catch (const Error& error) {
    rail.why = error.at("a new queue pair was refused");
    rail.fenced_here = true;
    rail.fenced_there = offer == nullptr;
    rail.since = Clock::now();
    rail.retry_at = Clock::now() + kFirstBackoff * (1 << std::min(++rail.failures, kMostDoublings));
    if (offer != nullptr) {
      rail.generation = offer->generation;
      send_frame(FrameType::kDown, rail);
    }
  }
}

void RdmaLink::on_frame(const Frame& frame) {
  if (frame.rail >= rails_.size()) return die({Code::kPeerLost, 0, "malformed frame: no such queue pair"});
  Rail& rail = *rails_[frame.rail];
  if (frame.type == FrameType::kOffer && role_ == Role::kAccept && rail.fenced_here && rail.fenced_there)
    return reopen(rail, &frame);
  if (frame.generation != rail.generation) return;
  if (frame.type == FrameType::kDown) {
    if (!rail.fenced_here) {
      doom(rail, {Code::kPeerLost, 0, "the other end's queue pair failed"});
      tear_down(rail);
    }
    rail.fenced_there = true;
  } else if (frame.type == FrameType::kAnswer && role_ == Role::kConnect && rail.state == Rail::State::kConnecting) {
    try {
      rail.connect(frame.qp);
      send_frame(FrameType::kReady, rail);
      probe(rail);
    } catch (const Error& error) {
      rail.state = Rail::State::kConnecting;  // connect() closed it: let it fail like any other
      doom(rail, error.at("a new queue pair was refused"));
    }
  } else if (frame.type == FrameType::kReady && role_ == Role::kAccept && rail.state == Rail::State::kConnecting) {
    probe(rail);
  }
}

void RdmaLink::send_frame(FrameType type, const Rail& rail, QpAddress qp) {
  const Frame frame{type, rail.index, rail.generation, qp, {}};
  const auto* raw = reinterpret_cast<const std::byte*>(&frame);
  side_out_.insert(side_out_.end(), raw, raw + sizeof frame);
}

void RdmaLink::side_io() {
  std::array<std::byte, 64 * sizeof(Frame)> buffer;
  ssize_t got = 0;
  bool closed = false;
  while ((got = ::recv(side_.get(), buffer.data(), buffer.size(), MSG_DONTWAIT)) > 0)
    side_in_.insert(side_in_.end(), buffer.begin(), buffer.begin() + got);
  if (got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR)) closed = true;
  const int error = got < 0 ? errno : 0;
  size_t at = 0;
  for (; lost_.ok() && at + sizeof(Frame) <= side_in_.size(); at += sizeof(Frame)) {
    Frame frame;
    std::memcpy(&frame, side_in_.data() + at, sizeof frame);
    on_frame(frame);
  }
  side_in_.erase(side_in_.begin(), side_in_.begin() + static_cast<std::ptrdiff_t>(at));
  if (closed && lost_.ok()) die({Code::kPeerLost, error, "the other end closed its side connection"});
}

void RdmaLink::repost() {
  while (!retry_.empty() && !fencing()) {
    const Work work = retry_.front();
    Rail* rail = choose();
    if (rail == nullptr) return;
    const std::optional<Keys> keys = keys_for(work, *rail);
    if (keys && rail->post({&work, 1}, {&*keys, 1}) == 0) return;
    retry_.pop_front();
    if (keys) continue;
    --work.batch->outstanding;  // an extent: the arena does not go away
    give_up(*work.batch, {Code::kInvalid, 0, "a region was deregistered"});
    settle(*work.batch);
  }
}

// Every wait of a rail ends: for an answer over the side connection, for a completion that the device owes.
void RdmaLink::bound_rails(Clock::time_point now) {
  const std::chrono::milliseconds patience(hub_.context.limits.peer_timeout_ms);
  for (const auto& rail : rails_) {
    if (rail->fenced_here && !rail->fenced_there && now - rail->since > patience)
      return die({Code::kPeerLost, 0, "the other end did not give up a queue pair that failed here"});
    if (rail->state == Rail::State::kConnecting && now - rail->since > patience)
      doom(*rail, {Code::kPeerLost, 0, "the other end did not answer for a queue pair"});
    if (rail->state > Rail::State::kConnecting && rail->stuck(now, patience))
      doom(*rail, {Code::kPeerLost, 0, "the device completed nothing"});
  }
}

// The peer is lost when no rail is up for the peer time-out, or when rails come up and fail again all that time without
// anything but probes getting through (a path that drops large packets).
void RdmaLink::bound_outage(Clock::time_point now) {
  const std::chrono::milliseconds patience(hub_.context.limits.peer_timeout_ms);
  if (!established_) return;  // connect has a deadline of its own
  if (usable())
    outage_since_ = {};
  else if (outage_since_ == Clock::time_point{})
    outage_since_ = now;
  if (batches_.empty() && pending_.empty() && messages_acked_ == messages_made_) fruitless_since_ = {};
  for (const Clock::time_point since : {outage_since_, fruitless_since_}) {
    if (since == Clock::time_point{} || now - since <= patience || !lost_.ok()) continue;
    const Status why = why_down();
    die({Code::kPeerLost, why.native, why.where, why.native_name});
  }
}

void RdmaLink::look_after_rails() {
  const auto now = Clock::now();
  bound_rails(now);
  for (const auto& rail : rails_)
    if (rail->port.dead.load()) doom(*rail, {Code::kPeerLost, 0, "the port went down"});
  while (!doomed_.empty() && lost_.ok()) tear_down(*doomed_.front());
  for (const auto& rail : rails_) {
    if (!lost_.ok()) return;
    if (rail->state == Rail::State::kDown && rail->fenced_here && rail->fenced_there && role_ == Role::kConnect &&
        now >= rail->retry_at && !rail->port.dead.load())
      reopen(*rail, nullptr);
    if (rail->up()) (void)rail->flush();
  }
  bound_outage(now);
}

void RdmaLink::progress(bool side_ready) {
  if (!started_ || !lost_.ok()) return;
  if (side_ready) side_io();
  if (lost_.ok()) look_after_rails();
  if (!lost_.ok()) return;
  repost();
  announce();
  pump();
  if (side_out_.empty()) return;
  const ssize_t sent = ::send(side_.get(), side_out_.data(), side_out_.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
  if (sent > 0) side_out_.erase(side_out_.begin(), side_out_.begin() + sent);
  if (sent < 0 && errno != EAGAIN && errno != EINTR) die({Code::kPeerLost, errno, "the side connection broke"});
}

void RdmaLink::die(Status why) {
  if (!lost_.ok()) return;
  lost_ = why;
  for (const auto& rail : rails_) {
    rail->close();  // nothing of ours leaves any more, and nothing of theirs lands
    rail->take_unfinished([](const Work&) {});
  }
  doomed_.clear();
  retry_.clear();
  pending_.clear();
  for (const auto& [id, out] : batches_) finish(*out, lost_);
  hub_.wake();
}

}  // namespace pdxfer::transport::rdma
