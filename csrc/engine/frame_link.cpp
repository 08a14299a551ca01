// See frame_link.hpp.
#include "engine/frame_link.hpp"

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

#include <array>
#include <cerrno>

#include "sys/socket.hpp"

namespace pdxfer::engine {
namespace {
constexpr size_t kReadBytes = 16 * 1024;
// A peer that stops reading must not make us keep frames without bound; a table of regions fits many times over.
constexpr size_t kMaxOutbox = 64u << 20;
}  // namespace

FrameLink::FrameLink(sys::UniqueFd socket, std::string who) : socket_(std::move(socket)), who_(std::move(who)) {
  const int flags = ::fcntl(socket_.get(), F_GETFL);
  if (flags < 0 || ::fcntl(socket_.get(), F_SETFL, flags | O_NONBLOCK) < 0)
    throw Error(Code::kInternal, "fcntl on the control socket failed: " + errno_name(errno), errno);
  // Frames are small and each side waits for the other's: held back until the one before is acknowledged, which the
  // other end's kernel delays by 40 ms, a handshake took 130 ms.
  if (sys::local_address(socket_.get()).family() != AF_UNIX)
    sys::set_option(socket_.get(), IPPROTO_TCP, TCP_NODELAY, 1, "TCP_NODELAY on the control socket");
}

void FrameLink::wait_for(short events, Deadline deadline, const char* doing) {
  for (;;) {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now()).count();
    if (left <= 0)
      throw Error(Code::kTimeout,
                  std::string("timed out ") + doing + " " + who_ +
                      "; is it overloaded, stopped, or not a pdxfer engine? (connect_timeout_ms bounds this)");
    pollfd entry{socket_.get(), events, 0};
    const int ready = ::poll(&entry, 1, static_cast<int>(std::min<long long>(left, 1000)));
    if (ready > 0) return;
    if (ready < 0 && errno != EINTR) throw Error(Code::kInternal, "poll failed: " + errno_name(errno), errno);
  }
}

void FrameLink::send(FrameType type, ByteView payload, Deadline deadline) {
  enqueue(type, payload);
  while (wants_to_send()) {
    const Status status = flush();
    if (!status.ok())
      throw Error(Code::kPeerLost, "lost " + who_ + " while sending: " + status.to_string(), status.native);
    if (wants_to_send()) wait_for(POLLOUT, deadline, "sending to");
  }
}

Frame FrameLink::receive(Deadline deadline) {
  for (;;) {
    if (auto frame = reader_.next()) return std::move(*frame);
    wait_for(POLLIN, deadline, "waiting for");
    const Status status = fill();
    if (!status.ok()) {
      if (auto frame = reader_.next()) return std::move(*frame);  // a refusal that came with the close
      throw Error(Code::kPeerLost, who_ + " closed the connection during the handshake: " + status.to_string(),
                  status.native);
    }
  }
}

Bytes FrameLink::expect(FrameType type, Deadline deadline) {
  Frame frame = receive(deadline);
  if (frame.type == FrameType::kReject) {
    const Refusal refusal = decode_refusal(frame.payload);
    throw Error(refusal.code, who_ + " refused the connection: " + refusal.text);
  }
  if (frame.type != type)
    throw Error(Code::kUnavailable, who_ + " sent control frame " + std::to_string(static_cast<int>(frame.type)) +
                                        " where " + std::to_string(static_cast<int>(type)) + " was due");
  return std::move(frame.payload);
}

void FrameLink::enqueue(FrameType type, ByteView payload) {
  if (sent_ == outbox_.size()) {
    outbox_.clear();
    sent_ = 0;
  }
  const Bytes frame = encode_frame(type, payload);
  outbox_.insert(outbox_.end(), frame.begin(), frame.end());
}

Status FrameLink::flush() noexcept {
  while (wants_to_send()) {
    const ssize_t n = ::send(fd(), outbox_.data() + sent_, outbox_.size() - sent_, MSG_NOSIGNAL);
    if (n > 0) {
      sent_ += static_cast<size_t>(n);
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      if (outbox_.size() - sent_ > kMaxOutbox) return {Code::kPeerLost, 0, "the peer stopped reading control frames"};
      return kOkStatus;
    } else if (errno != EINTR) {
      return {Code::kPeerLost, errno, "send on the control connection"};
    }
  }
  return kOkStatus;
}

Status FrameLink::fill() {
  std::array<std::byte, kReadBytes> chunk;
  for (size_t total = 0; total < kMaxFrame;) {
    const ssize_t n = ::recv(fd(), chunk.data(), chunk.size(), 0);
    if (n > 0) {
      reader_.feed(ByteView(chunk).first(static_cast<size_t>(n)));
      total += static_cast<size_t>(n);
    } else if (n == 0) {
      return {Code::kPeerLost, 0, "the peer closed the control connection"};
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      return kOkStatus;
    } else if (errno != EINTR) {
      return {Code::kPeerLost, errno, "receive on the control connection"};
    }
  }
  return kOkStatus;
}

}  // namespace pdxfer::engine
