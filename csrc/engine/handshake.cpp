// See handshake.hpp and docs/design/wire.md.
#include "engine/handshake.hpp"

#include <algorithm>
#include <cstring>

#include "core/codec.hpp"
#include "core/log.hpp"
#include "core/sha256.hpp"
#include "sys/socket.hpp"

namespace pdxfer::engine {
namespace {

using transport::Role;

constexpr size_t kNonceBytes = 32;
constexpr size_t kMaxTransports = 16;
constexpr size_t kMaxRegions = 1u << 20;
constexpr auto kTryTimeout = std::chrono::seconds(2);  // of one transport, so that the next gets its turn
constexpr auto kTellTime = std::chrono::milliseconds(250);

ByteView view(std::string_view text) { return std::as_bytes(std::span(text)); }

// Tell the other end, then throw the same. A failure to tell must not hide the reason.
[[noreturn]] void reject(FrameLink& link, Code code, const std::string& here, const std::string& told,
                         Deadline deadline) {
  try {
    link.send(FrameType::kReject, encode_refusal(code, told), deadline);
  } catch (const Error& error) {
    log(LogLevel::kDebug, "could not tell " + link.who() + " the refusal: " + error.what());
  }
  throw Error(code, here);
}

struct Hello {
  Identity identity;
  bool has_secret = false;
};

Bytes encode_hello(const Identity& self, bool has_secret) {
  std::array<std::byte, kNonceBytes> nonce;
  random_bytes(nonce);
  Writer writer;
  writer.raw(self.instance)
      .raw(nonce)
      .integer(static_cast<uint8_t>(has_secret))
      .text(std::string_view(self.name).substr(0, 255));
  return writer.take();
}

Hello decode_hello(ByteView payload, const std::string& who) {
  Reader reader{payload};
  Hello hello;
  const ByteView instance = reader.raw(hello.identity.instance.size());
  (void)reader.raw(kNonceBytes);
  hello.has_secret = reader.integer<uint8_t>() != 0;
  hello.identity.name = reader.text();
  if (!reader.done() || hello.identity.name.size() > 255)
    throw Error(Code::kUnavailable, who + " sent a malformed hello");
  std::memcpy(hello.identity.instance.data(), instance.data(), instance.size());
  for (char& c : hello.identity.name)
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
  return hello;
}

// What each role must show: bound to both hellos (nonces, instances, flags) and to the role, so that neither an old
// proof nor the other end's own can be played back.
Digest proof_of(Role role, std::string_view secret, ByteView connector_hello, ByteView acceptor_hello) {
  Writer writer;
  writer.text(role == Role::kConnect ? "pdxfer connector" : "pdxfer acceptor");
  writer.bytes(connector_hello).bytes(acceptor_hello);
  return hmac_sha256(view(secret), writer.view());
}

}  // namespace

Identity greet(FrameLink& link, Role role, const Identity& self, std::string_view secret, Deadline deadline) {
  const Bytes mine = encode_hello(self, !secret.empty());
  Bytes theirs;
  if (role == Role::kConnect) {
    link.send(FrameType::kHello, mine, deadline);
    theirs = link.expect(FrameType::kHello, deadline);
  } else {
    try {
      theirs = link.expect(FrameType::kHello, deadline);
    } catch (const Error& error) {
      reject(link, error.code(), error.what(), error.what(), deadline);  // another version learns why
    }
    link.send(FrameType::kHello, mine, deadline);
  }
  const Hello hello = decode_hello(theirs, link.who());
  if (hello.has_secret != !secret.empty()) {
    const std::string advice =
        "; set the same PDXFER_SECRET (Config.secret) on every engine of the deployment, or on none";
    reject(link, Code::kUnavailable,
           secret.empty() ? link.who() + " requires a shared secret and this engine has none" + advice
                          : link.who() + " has no shared secret and this engine requires one" + advice,
           secret.empty() ? "this engine has no shared secret, yours requires one" + advice
                          : "this engine requires a shared secret" + advice,
           deadline);
  }
  if (secret.empty()) return hello.identity;

  const ByteView connector = role == Role::kConnect ? ByteView(mine) : ByteView(theirs);
  const ByteView acceptor = role == Role::kConnect ? ByteView(theirs) : ByteView(mine);
  const Role other = role == Role::kConnect ? Role::kAccept : Role::kConnect;
  const auto show = [&] { link.send(FrameType::kProof, proof_of(role, secret, connector, acceptor), deadline); };
  const auto check = [&] {
    const Bytes shown = link.expect(FrameType::kProof, deadline);
    if (!equal_constant_time(shown, proof_of(other, secret, connector, acceptor)))
      reject(link, Code::kUnavailable,
             link.who() + " does not know the shared secret; PDXFER_SECRET differs between the two",
             "wrong shared secret; PDXFER_SECRET differs between the two", deadline);
  };
  if (role == Role::kConnect) {  // the connecting end proves first: a stranger gets no material of ours to work on
    show();
    check();
  } else {
    check();
    show();
  }
  return hello.identity;
}

namespace {

std::map<std::string, Bytes> exchange_offers(FrameLink& link, std::span<const Candidate> candidates,
                                             Deadline deadline) {
  Writer writer;
  uint8_t usable = 0;
  for (const Candidate& c : candidates) usable += c.refusal.empty();
  writer.integer(usable);
  for (const Candidate& c : candidates)
    if (c.refusal.empty()) writer.text(c.transport->name()).bytes(c.transport->address());
  link.send(FrameType::kOffer, writer.view(), deadline);

  const Bytes payload = link.expect(FrameType::kOffer, deadline);
  Reader reader{payload};
  const size_t count = reader.integer<uint8_t>();
  std::map<std::string, Bytes> offers;
  for (size_t i = 0; i < count && i < kMaxTransports && reader.ok(); ++i) {
    std::string name = reader.text();
    const ByteView address = reader.bytes();
    offers.emplace(std::move(name), Bytes(address.begin(), address.end()));
  }
  if (!reader.done()) throw Error(Code::kUnavailable, link.who() + " sent a malformed offer");
  return offers;
}

struct Attempt {
  std::unique_ptr<transport::Peer> peer;
  std::string reason;  // why there is none
};

Attempt attempt(transport::Transport& transport, const transport::Link& link) {
  try {
    return {transport.connect(link), ""};
  } catch (const Error& error) {
    return {nullptr, error.what()};
  }
}

// Until when one transport may try: a share of the time while others wait for their turn; when none does, all but what
// telling the other end takes.
Deadline try_until(std::span<const Candidate> candidates, Deadline deadline) {
  const auto usable = std::ranges::count_if(candidates, [](const Candidate& c) { return c.refusal.empty(); });
  const Deadline share = std::chrono::steady_clock::now() + kTryTimeout;
  return std::min(deadline, usable == 1 ? std::max(share, deadline - kTellTime) : share);
}

transport::Link link_for(const FrameLink& control, PeerId peer, Role role, Bytes address, ByteView token,
                         Deadline deadline) {
  transport::Link link;
  link.peer = peer;
  link.role = role;
  link.address = std::move(address);
  link.host_hint = sys::split_host_port(control.who()).first;
  std::memcpy(link.token, token.data(), sizeof link.token);
  link.deadline = deadline;
  return link;
}

[[noreturn]] void reject_all(FrameLink& link, const Choice& choice, Deadline deadline) {
  std::string reasons;
  for (const auto& [name, reason] : choice.passed_over) reasons += (reasons.empty() ? "" : "; ") + name + ": " + reason;
  const std::string text = "no transport reaches " + link.who() + " (" +
                           (reasons.empty() ? "none in common" : reasons) + "); run `pdxfer doctor` on both machines";
  reject(link, Code::kUnavailable, text, text, deadline);
}

Choice lead(FrameLink& link, PeerId peer, std::span<const Candidate> candidates, std::map<std::string, Bytes> offers,
            Deadline deadline) {
  Choice choice;
  for (const Candidate& candidate : candidates) {
    const std::string name = candidate.transport->name();
    const auto offer = offers.find(name);
    if (!candidate.refusal.empty() || offer == offers.end()) {
      choice.passed_over.emplace_back(
          name, candidate.refusal.empty() ? "the other end does not offer it" : candidate.refusal);
      continue;
    }
    std::array<std::byte, sizeof transport::Link::token> token;
    random_bytes(token);
    link.send(FrameType::kTry, Writer{}.text(name).raw(token).take(), deadline);
    Attempt mine = attempt(*candidate.transport,
                           link_for(link, peer, Role::kConnect, offer->second, token, try_until(candidates, deadline)));
    const Bytes result = link.expect(FrameType::kResult, deadline);
    Reader reader{result};
    const bool theirs = reader.integer<uint8_t>() == 1;
    std::string their_reason = reader.text();
    if (!reader.done()) throw Error(Code::kUnavailable, link.who() + " sent a malformed result");
    if (mine.peer != nullptr && theirs) {
      link.send(FrameType::kChosen, Writer{}.text(name).take(), deadline);
      choice.transport = candidate.transport;
      choice.peer = std::move(mine.peer);
      return choice;
    }
    choice.passed_over.emplace_back(name, mine.peer == nullptr ? mine.reason : "at the other end: " + their_reason);
  }
  reject_all(link, choice, deadline);
}

Choice follow(FrameLink& link, PeerId peer, std::span<const Candidate> candidates, std::map<std::string, Bytes> offers,
              Deadline deadline) {
  Choice choice;
  std::string tried;
  for (size_t round = 0; round <= kMaxTransports; ++round) {
    const Frame frame = link.receive(deadline);
    Reader reader{frame.payload};
    if (frame.type == FrameType::kReject) throw Error(Code::kUnavailable, decode_refusal(frame.payload).text);
    const std::string name = reader.text();
    if (frame.type == FrameType::kChosen && reader.done() && choice.peer != nullptr && name == tried) return choice;
    const ByteView token = reader.raw(sizeof transport::Link::token);
    if (frame.type != FrameType::kTry || !reader.done())
      throw Error(Code::kUnavailable, link.who() + " sent control frame " +
                                          std::to_string(static_cast<int>(frame.type)) +
                                          " where it had to choose a transport");
    if (choice.transport != nullptr) choice.passed_over.emplace_back(tried, "the connecting end could not use it");
    choice.transport = nullptr;
    choice.peer.reset();
    Attempt mine{nullptr, "not offered by this end"};
    for (const Candidate& c : candidates)
      if (c.refusal.empty() && name == c.transport->name() && offers.contains(name)) {
        mine = attempt(*c.transport,
                       link_for(link, peer, Role::kAccept, offers.at(name), token, try_until(candidates, deadline)));
        if (mine.peer != nullptr) choice.transport = c.transport;
      }
    if (mine.peer == nullptr) choice.passed_over.emplace_back(name, mine.reason);
    tried = name;
    choice.peer = std::move(mine.peer);
    link.send(FrameType::kResult,
              Writer{}.integer(static_cast<uint8_t>(choice.peer != nullptr)).text(mine.reason).take(), deadline);
  }
  throw Error(Code::kUnavailable, link.who() + " tried more transports than there are");
}

}  // namespace

Choice choose_transport(FrameLink& link, Role role, PeerId peer, std::span<const Candidate> candidates,
                        Deadline deadline) {
  link.allow(kMaxFrame);
  std::map<std::string, Bytes> offers = exchange_offers(link, candidates, deadline);
  return role == Role::kConnect ? lead(link, peer, candidates, std::move(offers), deadline)
                                : follow(link, peer, candidates, std::move(offers), deadline);
}

Bytes encode_region(const RegionNotice& notice) {
  Writer writer;
  writer.integer(notice.region.id).integer(reinterpret_cast<uint64_t>(notice.region.buffer.data));
  writer.integer(notice.region.buffer.bytes)
      .integer(static_cast<int32_t>(notice.region.buffer.device))
      .bytes(notice.key);
  return writer.take();
}

RegionNotice decode_region(ByteView payload) {
  Reader reader{payload};
  RegionNotice notice;
  notice.region.id = reader.integer<uint32_t>();
  notice.region.buffer.data = reinterpret_cast<std::byte*>(reader.integer<uint64_t>());
  notice.region.buffer.bytes = reader.integer<uint64_t>();
  notice.region.buffer.device = reader.integer<int32_t>();
  const ByteView key = reader.bytes();
  if (!reader.done() || notice.region.id == kNoId)
    throw Error(Code::kUnavailable, "the peer published a malformed region");
  notice.key.assign(key.begin(), key.end());
  return notice;
}

std::vector<RegionNotice> exchange_regions(FrameLink& link, Role role, std::span<const RegionNotice> ours,
                                           Deadline deadline) {
  const auto tell = [&] {
    for (const RegionNotice& notice : ours) link.send(FrameType::kRegion, encode_region(notice), deadline);
    link.send(FrameType::kSync, {}, deadline);
  };
  const auto learn = [&] {
    std::vector<RegionNotice> theirs;
    for (;;) {
      const Frame frame = link.receive(deadline);
      if (frame.type == FrameType::kSync) return theirs;
      if (frame.type != FrameType::kRegion || theirs.size() >= kMaxRegions)
        throw Error(Code::kUnavailable, link.who() + " sent control frame " +
                                            std::to_string(static_cast<int>(frame.type)) +
                                            " while publishing its regions");
      theirs.push_back(decode_region(frame.payload));
    }
  };
  // One after the other: two ends that both send first could fill both sockets and wait for ever.
  if (role == Role::kAccept) tell();
  std::vector<RegionNotice> theirs = learn();
  if (role == Role::kConnect) {
    tell();
    link.expect(FrameType::kSync, deadline);  // the other end's worker has the peer: what is sent now finds it there
  }
  return theirs;
}

}  // namespace pdxfer::engine
