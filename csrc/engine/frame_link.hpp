// FrameLink: control frames over one socket. Blocking with a deadline during the handshake (a caller's or the
// acceptor's thread), then non-blocking in the worker. Owns the socket.
#pragma once

#include <chrono>

#include "engine/frame.hpp"
#include "sys/fd.hpp"

namespace pdxfer::engine {

using Deadline = std::chrono::steady_clock::time_point;

class FrameLink {
 public:
  FrameLink() = default;  // closed
  // `who` names the other end in errors: "10.0.0.2:4711".
  FrameLink(sys::UniqueFd socket, std::string who);

  // Handshake phase. Each throws Error: kTimeout at the deadline, kPeerLost when the other end closed.
  void send(FrameType type, ByteView payload, Deadline deadline);
  // The next frame, which must be of this type; kReject becomes an Error with the other end's words and code.
  Bytes expect(FrameType type, Deadline deadline);
  Frame receive(Deadline deadline);
  void allow(uint32_t max_payload) { reader_.allow(max_payload); }

  // Worker phase: never blocks. Not ok once the other end is gone.
  void enqueue(FrameType type, ByteView payload);
  Status flush() noexcept;  // sends what the socket takes
  Status fill();            // receives at most kMaxFrame bytes; throws Error on malformed bytes via next()
  std::optional<Frame> next() { return reader_.next(); }
  bool wants_to_send() const noexcept { return sent_ < outbox_.size(); }

  int fd() const noexcept { return socket_.get(); }
  const std::string& who() const noexcept { return who_; }

 private:
  void wait_for(short events, Deadline deadline, const char* doing);

  sys::UniqueFd socket_;
  std::string who_;
  FrameReader reader_{kMaxGreeting};
  Bytes outbox_;
  size_t sent_ = 0;
};

}  // namespace pdxfer::engine
