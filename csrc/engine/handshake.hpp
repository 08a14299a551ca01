// The handshake: from a fresh TCP connection to an authenticated peer with a chosen transport and known regions.
// Runs on the thread that called Engine::connect, and on one of the acceptor's, with a deadline. docs/design/wire.md
// has the sequence. Nothing of the other end is trusted before prove() returned.
#pragma once

#include <array>
#include <map>
#include <memory>

#include "engine/frame_link.hpp"
#include "transport/transport.hpp"

namespace pdxfer::engine {

using Instance = std::array<std::byte, 16>;  // random per engine: tells a restarted peer from the one before

struct Identity {
  Instance instance{};
  std::string name;  // "host:pid", for people
};

// Exchange hellos and prove the shared secret to one another. Returns who the other end is. Throws Error(kUnavailable)
// on another wire version, a wrong secret, or when only one end has a secret, after telling the other end why.
Identity greet(FrameLink& link, transport::Role role, const Identity& self, std::string_view secret, Deadline deadline);

// One transport of this end, in order of preference.
struct Candidate {
  transport::Transport* transport = nullptr;
  std::string refusal;  // why configuration keeps it from being used; empty: usable
};

struct Choice {
  transport::Transport* transport = nullptr;
  std::unique_ptr<transport::Peer> peer;
  std::vector<std::pair<std::string, std::string>> passed_over;  // transport, reason: for explain()
};

// Agree on the first transport that both ends can connect, in the connecting end's order.
// Throws Error(kUnavailable) with every reason when there is none.
Choice choose_transport(FrameLink& link, transport::Role role, PeerId peer, std::span<const Candidate> candidates,
                        Deadline deadline);

// One region as published: what kRegion carries.
struct RegionNotice {
  Region region;
  Bytes key;  // for the chosen transport
};
Bytes encode_region(const RegionNotice& notice);
RegionNotice decode_region(ByteView payload);  // throws Error(kUnavailable)

// Send ours and learn theirs. The connecting end returns when the other end's worker, which then sends kSync, has the
// peer; so connect() returns only when both ends know everything.
std::vector<RegionNotice> exchange_regions(FrameLink& link, transport::Role role, std::span<const RegionNotice> ours,
                                           Deadline deadline);

}  // namespace pdxfer::engine
