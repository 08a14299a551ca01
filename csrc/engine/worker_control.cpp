// The worker's half that talks on control connections: regions, heartbeats, loss and goodbye. Under turn_.
#include "core/log.hpp"
#include "engine/worker.hpp"

namespace pdxfer::engine {
namespace {

RegionId decode_region_id(ByteView payload) {
  RegionId id = kNoId;
  if (payload.size() != sizeof id) throw Error(Code::kUnavailable, "malformed region id");
  std::copy(payload.begin(), payload.end(), reinterpret_cast<std::byte*>(&id));
  return id;
}

ByteView encode_region_id(const RegionId& id) { return std::as_bytes(std::span(&id, 1)); }

}  // namespace

// Tell one peer of the regions that it does not know and of those that it should let go of.
void Worker::publish_to(PeerState& peer) {
  for (const RegionNotice& notice : notices_(*peer.transport)) {
    if (peer.published.contains(notice.region.id) || !regions_.get(notice.region.id)) continue;
    peer.control.enqueue(FrameType::kRegion, encode_region(notice));
    peer.published.insert(notice.region.id);
  }
  for (auto it = peer.published.begin(); it != peer.published.end();) {
    if (regions_.get(*it)) {
      ++it;
      continue;
    }
    peer.control.enqueue(FrameType::kForget, encode_region_id(*it));
    peer.withdrawn.insert(*it);
    it = peer.published.erase(it);
  }
}

void Worker::on(Publish&) {
  for (const auto& [id, peer] : peers_)
    if (peer->alive()) publish_to(*peer);
}

// The engine has taken the region off its table already, so no new batch can name it.
void Worker::on(Withdraw& withdraw) {
  for (const auto& [id, peer] : peers_) {
    const std::vector<std::shared_ptr<Batch>> active = peer->active;
    for (const auto& batch : active)
      if (uses(*batch, Side::kSrc, withdraw.region))
        refuse(*peer, *batch, {Code::kInvalid, 0, "source region was deregistered"});
    if (peer->alive()) publish_to(*peer);
  }
  withdrawals_.push_back(
      {withdraw.region, std::move(withdraw.done), Clock::now() + std::chrono::milliseconds(config_.peer_timeout_ms)});
}

// A withdrawal is over when no batch of ours reads the region and every peer has let go of it. A peer that does not in
// time is dropped: its link is closed, which is the fence that is left.
void Worker::settle_withdrawals(Clock::time_point now) {
  std::erase_if(withdrawals_, [&](Withdrawal& withdrawal) {
    bool held = false;
    for (const auto& [id, peer] : peers_) {
      if (!peer->alive()) continue;
      bool holds = peer->withdrawn.contains(withdrawal.region);
      for (const auto& batch : peer->active) holds |= uses(*batch, Side::kSrc, withdrawal.region);
      if (holds && now >= withdrawal.deadline) {
        lose(*peer, "it did not let go of region " + std::to_string(withdrawal.region) + " in time");
        holds = false;
      }
      held |= holds;
    }
    if (!held) withdrawal.done->set_value();
    return !held;
  });
}

// The peer wants regions back: let go of each once no batch of ours writes it any more.
void Worker::forget_finished(PeerState& peer) {
  std::erase_if(peer.forgetting, [&](RegionId region) {
    for (const auto& batch : peer.active)
      if (uses(*batch, Side::kDst, region)) return false;
    peer.link->forget_region(region);
    peer.control.enqueue(FrameType::kForgotten, encode_region_id(region));
    return true;
  });
}

void Worker::handle(PeerState& peer, const Frame& frame) {
  switch (frame.type) {
    case FrameType::kPing:
      return;
    case FrameType::kRegion: {
      const RegionNotice notice = decode_region(frame.payload);
      peer.link->import_region(notice.region, notice.key);
      peer.regions.add(notice.region);
      peer.set_link_text(peer.link->describe());
      return;
    }
    case FrameType::kForget: {
      const RegionId region = decode_region_id(frame.payload);
      if (!peer.regions.remove(region))
        throw Error(Code::kUnavailable, "the peer withdrew a region it never published");
      peer.forgetting.insert(region);
      const std::vector<std::shared_ptr<Batch>> active = peer.active;
      for (const auto& batch : active)
        if (uses(*batch, Side::kDst, region))
          refuse(peer, *batch, {Code::kInvalid, 0, "destination region was withdrawn"});
      return;
    }
    case FrameType::kForgotten:
      if (peer.withdrawn.erase(decode_region_id(frame.payload)) == 0)
        throw Error(Code::kUnavailable, "the peer let go of a region that it was not asked for");
      return;
    case FrameType::kGoodbye:
      lose(peer, decode_refusal(frame.payload).text);
      return;
    default:
      throw Error(Code::kUnavailable, "unexpected control frame " + std::to_string(static_cast<int>(frame.type)));
  }
}

bool Worker::control_io(PeerState& peer, bool readable) {
  bool any = false;
  try {
    const Status received = readable ? peer.control.fill() : kOkStatus;
    while (peer.alive()) {  // frames that came before a close still count: a goodbye says more than an end of file
      const std::optional<Frame> frame = peer.control.next();
      if (!frame) break;
      peer.last_heard = Clock::now();
      handle(peer, *frame);
      any = true;
    }
    if (peer.alive() && !received.ok()) lose(peer, received.to_string());
    if (peer.alive())
      if (const Status sent = peer.control.flush(); !sent.ok()) lose(peer, sent.to_string());
  } catch (const Error& error) {
    lose(peer, std::string("protocol error: ") + error.what());
  }
  return any;
}

void Worker::keep_alive(Clock::time_point now) {
  const auto timeout = std::chrono::milliseconds(config_.peer_timeout_ms);
  for (const auto& [id, peer] : peers_) {
    if (!peer->alive()) continue;
    if (now - peer->last_ping > timeout / 3) {
      peer->last_ping = now;
      peer->set_link_text(peer->link->describe());  // its counts, for explain()
      peer->control.enqueue(FrameType::kPing, {});
      control_io(*peer, false);
    }
    // Read once more before the verdict: it may be this thread that was held up, not the peer.
    if (peer->alive() && now - peer->last_heard > timeout) {
      control_io(*peer, true);
      if (peer->alive() && Clock::now() - peer->last_heard > timeout)
        lose(*peer, "silent for more than " + std::to_string(config_.peer_timeout_ms) +
                        " ms (peer_timeout_ms): its process is stopped or its host is gone");
    }
  }
}

// The end of a peer: its link goes first, because only then does nothing read our sources or write our memory; whoever
// sees the peer lost may use both for something else.
//
// What the link had completed before is handed on first: its other end was told, and counts on it. A sender that closes
// at once can be gone before its last batch was looked for here.
void Worker::lose(PeerState& peer, const std::string& reason) {
  if (!peer.alive()) return;
  drain(*peer.transport);
  peer.link.reset();
  peer.mark_lost(reason);
  lost_.push_back(peer.id);
  log(LogLevel::kInfo,
      "peer " + std::to_string(peer.id) + " (" + peer.identity.name + ", " + peer.address + ") lost: " + reason);
  poller_.remove(peer.control.fd());
  drain(*peer.transport);  // what the end of the link completed keeps its own answer
  const std::vector<std::shared_ptr<Batch>> active = std::move(peer.active);
  peer.active.clear();
  for (const auto& batch : active) {
    const bool asked = batch->stage == Batch::Stage::kCancelling && batch->refused.code == Code::kCancelled;
    const bool told = batch->refused.code == Code::kPeerLost;  // by the transport, with more to say
    finish(peer, batch,
           asked || told ? batch->refused : Status{Code::kPeerLost, 0, "the peer was lost with the batch in flight"});
  }
}

void Worker::on(Drop& drop) {
  PeerState& peer = *drop.peer;
  if (peer.alive() && peers_.contains(peer.id)) {
    peer.control.enqueue(FrameType::kGoodbye, encode_refusal(Code::kPeerLost, drop.reason));
    (void)peer.control.flush();
    lose(peer, drop.reason);
  }
  drop.done->set_value();
}

void Worker::reap() {
  for (const PeerId id : lost_) {
    const auto it = peers_.find(id);
    if (it == peers_.end()) continue;
    it->second->control = FrameLink();
    peers_.erase(it);
  }
  lost_.clear();
}

}  // namespace pdxfer::engine
