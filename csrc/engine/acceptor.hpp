// Acceptor: listens on the control port and runs each newcomer's handshake on a thread of its own, at most a few at a
// time, each with a deadline, so that a slow or hostile client holds up nobody and nothing for long.
#pragma once

#include <atomic>
#include <functional>
#include <list>
#include <mutex>
#include <thread>

#include "engine/frame_link.hpp"
#include "sys/poller.hpp"
#include "sys/socket.hpp"

namespace pdxfer::engine {

class Acceptor {
 public:
  // `welcome` runs on a handshake thread; it may throw Error, which is logged.
  using Welcome = std::function<void(FrameLink link, Deadline deadline)>;

  // Listens at once. Throws Error(kUnavailable): port in use, no such address.
  Acceptor(const std::string& host, uint16_t port, std::chrono::milliseconds timeout, Welcome welcome);
  ~Acceptor();
  // Stops listening and waits for handshakes under way, each bounded by its deadline.
  void stop();
  uint16_t port() const noexcept { return port_; }

 private:
  static constexpr size_t kMaxHandshakes = 32;
  struct Handshake {
    std::thread thread;
    std::atomic<bool> finished{false};
  };

  void run();
  void start_handshake(sys::UniqueFd socket);
  void join(bool all);

  sys::UniqueFd socket_;
  uint16_t port_ = 0;
  const std::chrono::milliseconds timeout_;
  const Welcome welcome_;
  std::atomic<bool> stopping_{false};
  std::list<Handshake> handshakes_;  // the listening thread's alone
  sys::Poller poller_;
  std::thread thread_;
};

}  // namespace pdxfer::engine
