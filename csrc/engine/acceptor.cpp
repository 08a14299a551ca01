// See acceptor.hpp.
#include "engine/acceptor.hpp"

#include <pthread.h>
#include <sys/socket.h>

#include <array>
#include <cerrno>

#include "core/log.hpp"

namespace pdxfer::engine {

Acceptor::Acceptor(const std::string& host, uint16_t port, std::chrono::milliseconds timeout, Welcome welcome)
    : socket_(sys::listen_on(host, port)),
      port_(sys::local_address(socket_.get()).port()),
      timeout_(timeout),
      welcome_(std::move(welcome)) {
  poller_.add(socket_.get(), EPOLLIN, this);
  thread_ = std::thread([this] {
    ::pthread_setname_np(::pthread_self(), "pdx-accept");
    run();
  });
}

Acceptor::~Acceptor() { stop(); }

void Acceptor::stop() {
  stopping_.store(true);
  poller_.wake();
  if (thread_.joinable()) thread_.join();
}

void Acceptor::join(bool all) {
  std::erase_if(handshakes_, [all](Handshake& handshake) {
    if (!all && !handshake.finished.load()) return false;
    handshake.thread.join();
    return true;
  });
}

void Acceptor::start_handshake(sys::UniqueFd socket) {
  Handshake& handshake = handshakes_.emplace_back();
  handshake.thread = std::thread([this, &handshake, fd = socket.release()] {
    sys::UniqueFd owned(fd);
    try {
      const std::string who = sys::remote_address(owned.get()).to_string();
      welcome_(FrameLink(std::move(owned), who), std::chrono::steady_clock::now() + timeout_);
    } catch (const std::exception& error) {
      log(stopping_.load() ? LogLevel::kDebug : LogLevel::kWarning,
          std::string("a connection came to nothing: ") + error.what());
    }
    handshake.finished.store(true);
    poller_.wake();
  });
}

void Acceptor::run() {
  std::array<sys::Poller::Event, 4> events;
  bool listening = true;
  while (!stopping_.load()) {
    poller_.wait(events, 250);
    join(false);
    // With every place taken, newcomers wait in the kernel's backlog; each place is free again within the time-out.
    while (!stopping_.load() && handshakes_.size() < kMaxHandshakes) {
      sys::UniqueFd socket(::accept4(socket_.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
      if (socket) {
        start_handshake(std::move(socket));
      } else if (errno == EMFILE || errno == ENFILE) {
        log(LogLevel::kError,
            "cannot accept a peer: " + errno_name(errno) + "; raise the limit of open files (ulimit -n)");
        std::this_thread::sleep_for(std::chrono::milliseconds(100));
        break;
      } else {
        break;
      }
    }
    if (const bool room = handshakes_.size() < kMaxHandshakes; room != listening) {
      listening = room;
      poller_.modify(socket_.get(), room ? EPOLLIN : 0u, this);
    }
  }
  socket_.reset();
  join(true);
}

}  // namespace pdxfer::engine
