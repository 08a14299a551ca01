// The five steps of set-up: token, hello, probe, verdict, rings. Each end sends a step and then reads the other's, so
// neither waits for the other to begin. See shm_handshake.hpp.
#include "transport/shm/shm_handshake.hpp"

#include <sys/random.h>

#include <cerrno>
#include <cstring>
#include <memory>
#include <vector>

namespace pdxfer::transport::shm {
namespace {

constexpr int32_t kNotTried = -1;

std::array<uint64_t, 2> random_pair() {
  std::array<uint64_t, 2> value{};
  if (::getrandom(value.data(), sizeof value, 0) != static_cast<ssize_t>(sizeof value))
    throw Error(Code::kUnavailable, "getrandom: " + errno_name(errno), errno);
  return value;
}

// The cookie goes with it: a peer that is late finds nothing to write to.
class ProbeTarget {
 public:
  ProbeTarget() : area_(std::make_unique<ProbeArea>()) { area_->cookie = random_pair(); }
  ProbeTarget(const ProbeTarget&) = delete;
  ProbeTarget& operator=(const ProbeTarget&) = delete;
  ~ProbeTarget() {
    for (volatile uint64_t& word : area_->cookie) word = 0;
  }
  uint64_t address() const { return reinterpret_cast<uint64_t>(area_.get()); }
  const std::array<uint64_t, 2>& cookie() const { return area_->cookie; }
  bool holds(const std::array<uint64_t, 2>& nonce) const {
    for (size_t i = 0; i < nonce.size(); ++i)
      if (static_cast<const volatile uint64_t&>(area_->nonce[i]) != nonce[i]) return false;
    return true;
  }

 private:
  std::unique_ptr<ProbeArea> area_;
};

class Conversation {
 public:
  Conversation(int socket, Deadline deadline) : socket_(socket), deadline_(deadline) {}

  void say(Type type, int32_t code, ByteView body, std::span<const int> fds = {}) {
    Header header;
    header.type = type;
    header.code = code;
    const iovec parts[] = {{&header, sizeof header}, {const_cast<std::byte*>(body.data()), body.size()}};
    if (const int error = sys::send_message(socket_, parts, fds); error != 0)
      throw Error(Code::kUnavailable, "shm: set-up message to the peer: " + errno_name(error), error);
  }

  // The peer's message of this type; its body stays valid until the next call.
  ByteView hear(Type type, int32_t& code, std::vector<sys::UniqueFd>* fds = nullptr) {
    sys::wait_readable(socket_, deadline_, "shm: waiting for the peer's set-up");
    buffer_.resize(4096);
    const int64_t n = sys::recv_message(socket_, buffer_, fds);
    if (n <= 0)
      throw Error(Code::kUnavailable,
                  n == 0 ? std::string("shm: the peer gave up during set-up; its log says why")
                         : "shm: set-up message from the peer: " + errno_name(static_cast<int>(-n)),
                  static_cast<int32_t>(-n));
    Header header;
    if (n < static_cast<int64_t>(sizeof header)) throw Error(Code::kUnavailable, "shm: the peer's set-up is malformed");
    std::memcpy(&header, buffer_.data(), sizeof header);
    if (header.type != type) throw Error(Code::kUnavailable, "shm: the peer's set-up is out of order");
    code = header.code;
    return ByteView(buffer_).subspan(sizeof header, static_cast<size_t>(n) - sizeof header);
  }

 private:
  int socket_;
  Deadline deadline_;
  Bytes buffer_;
};

struct Hello {
  uint64_t probe = 0;
  std::array<uint64_t, 2> cookie{};
  std::string path;

  Bytes encode() const {
    return Writer().integer(kVersion).integer(probe).integer(cookie[0]).integer(cookie[1]).text(path).take();
  }
  static Hello decode(ByteView body) {
    Reader reader(body);
    Hello hello;
    const auto version = reader.integer<uint32_t>();
    hello.probe = reader.integer<uint64_t>();
    hello.cookie = {reader.integer<uint64_t>(), reader.integer<uint64_t>()};
    hello.path = reader.text();
    if (!reader.ok() || version != kVersion) throw Error(Code::kUnavailable, "shm: the peer's hello is malformed");
    return hello;
  }
};

struct Outcome {
  int32_t ours = 0, theirs = 0;  // 0: this end's writes reach the other; the other's writes reach this end
};

// Each end tries the other's memory and is told by it whether that worked.
Outcome probe(Conversation& talk, int process, const Hello& there, const ProbeTarget& target, bool wanted) {
  const std::array<uint64_t, 2> nonce = random_pair();
  const int32_t tried = wanted ? probe_process(process, there.probe, there.cookie, nonce) : kNotTried;
  talk.say(Type::kProbe, tried, Writer().integer(nonce[0]).integer(nonce[1]).take());
  Outcome outcome;
  Reader reader(talk.hear(Type::kProbe, outcome.theirs));
  const std::array<uint64_t, 2> their_nonce{reader.integer<uint64_t>(), reader.integer<uint64_t>()};
  if (outcome.theirs == 0 && !target.holds(their_nonce)) outcome.theirs = EBADMSG;
  talk.say(Type::kVerdict, outcome.theirs, {});
  talk.hear(Type::kVerdict, outcome.ours);
  return outcome;
}

bool needs_ring(const std::string& path, int32_t outcome) {
  return path == "staging" || (path == "auto" && outcome != 0);
}

std::unique_ptr<RingChannel> exchange_rings(Conversation& talk, uint64_t bytes) {
  RingEnd mine = RingEnd::make(bytes);
  const int fds[] = {mine.memory.get(), mine.bell.get()};
  talk.say(Type::kRing, 0, Writer().integer(mine.bytes).take(), fds);
  std::vector<sys::UniqueFd> received;
  int32_t code = 0;
  Reader reader(talk.hear(Type::kRing, code, &received));
  RingEnd theirs;
  theirs.bytes = reader.integer<uint64_t>();
  if (!reader.done() || received.size() != 2) throw Error(Code::kUnavailable, "shm: the peer's ring is malformed");
  theirs.memory = std::move(received[0]);
  theirs.bell = std::move(received[1]);
  return std::make_unique<RingChannel>(std::move(mine), std::move(theirs));
}

}  // namespace

Connection make_connection(const Context& context, const local::Address& here, sys::TokenListener& listener,
                           const transport::Link& link) {
  Connection made;
  made.socket = local::open_socket(kProtocol, here, listener, link);
  made.process = sys::peer_process(made.socket.get());
  Conversation talk(made.socket.get(), link.deadline);
  const ProbeTarget target;
  talk.say(Type::kHello, 0, Hello{target.address(), target.cookie(), context.shm_path}.encode());
  int32_t code = 0;
  const Hello there = Hello::decode(talk.hear(Type::kHello, code));
  const bool wanted = context.shm_path == "auto" || context.shm_path == "cma";
  const Outcome outcome = probe(talk, made.process, there, target, wanted);
  if (outcome.ours == 0) {
    made.cma.emplace(made.process);
  } else {
    made.why_not_cma = outcome.ours == kNotTried ? "shm_path=" + context.shm_path : explain_probe(outcome.ours);
    if (context.shm_path == "cma")
      throw Error(Code::kUnavailable, "shm: shm_path=cma, but " + made.why_not_cma, outcome.ours);
  }
  if (needs_ring(context.shm_path, outcome.ours) || needs_ring(there.path, outcome.theirs))
    made.ring = exchange_rings(talk, context.limits.staging_bytes);
  return made;
}

}  // namespace pdxfer::transport::shm
