// Accepting, checking and parking connections; see token_listener.hpp.
#include "sys/token_listener.hpp"

#include <pthread.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <list>
#include <mutex>
#include <thread>
#include <vector>

#include "core/log.hpp"
#include "core/status.hpp"
#include "sys/poller.hpp"

namespace pdxfer::sys {
namespace {

constexpr size_t kMaxPending = 64;    // connections that have not shown their preamble
constexpr size_t kMaxStrangers = 64;  // parked under a token that nobody expects yet
constexpr auto kPreambleTime = std::chrono::seconds(2);
constexpr auto kStrangerTime = std::chrono::seconds(3);

uint32_t read_u32(const std::byte* at) noexcept {
  uint32_t value = 0;
  for (int i = 3; i >= 0; --i) value = value << 8 | std::to_integer<uint32_t>(at[i]);
  return value;
}

void write_u32(std::byte* at, uint32_t value) noexcept {
  for (int i = 0; i < 4; ++i) at[i] = static_cast<std::byte>(value >> (8 * i));
}

// The time it takes says nothing about where the tokens differ.
bool equal(const Token& a, const Token& b) noexcept {
  unsigned difference = 0;
  for (size_t i = 0; i < a.size(); ++i) difference |= static_cast<unsigned>(a[i] ^ b[i]);
  return difference == 0;
}

}  // namespace

std::array<std::byte, kPreambleBytes> encode_preamble(const Token& token, uint32_t index) noexcept {
  std::array<std::byte, kPreambleBytes> bytes{};
  std::memcpy(bytes.data(), token.data(), token.size());
  write_u32(bytes.data() + 16, index);
  write_u32(bytes.data() + 20, kPreambleMagic);
  return bytes;
}

void send_preamble(int fd, const Token& token, uint32_t index, Deadline deadline) {
  send_exact(fd, encode_preamble(token, index), deadline);
}

struct TokenListener::State {
  struct Pending {  // has connected, its preamble is incomplete; owned by the thread
    UniqueFd fd;
    std::array<std::byte, kPreambleBytes> bytes{};
    size_t have = 0;
    Deadline deadline;
    bool done = false;
  };
  struct Parked {
    Token token;
    uint32_t index = 0;
    UniqueFd fd;
    Deadline deadline;  // meaningful while nobody expects the token
  };
  struct Expected {
    Token token;
    uint32_t left = 0;
  };

  UniqueFd listening;
  Poller poller;
  std::list<Pending> pending;
  Deadline accept_again{};  // after running out of descriptors
  bool accepting = true;

  std::mutex mutex;  // guards what follows
  std::condition_variable changed;
  std::vector<Expected> expected;
  std::vector<Parked> parked;
  bool stopping = false;
  std::thread thread;

  void run() noexcept;
  void accept_all() noexcept;
  void make_room() noexcept;
  void read_preamble(Pending& connection) noexcept;
  void park(const Token& token, uint32_t index, UniqueFd fd);
  int sweep() noexcept;
  Expected* find_expected(const Token& token) noexcept;
  std::pair<uint32_t, UniqueFd> take(const Token& token, const uint32_t* index, Deadline deadline);
};

TokenListener::State::Expected* TokenListener::State::find_expected(const Token& token) noexcept {
  Expected* found = nullptr;
  for (Expected& e : expected)
    if (equal(e.token, token)) found = &e;
  return found;
}

void TokenListener::State::park(const Token& token, uint32_t index, UniqueFd fd) {
  const std::lock_guard lock(mutex);
  Expected* known = find_expected(token);
  if (known == nullptr) {
    const auto strangers =
        std::count_if(parked.begin(), parked.end(), [&](const Parked& p) { return find_expected(p.token) == nullptr; });
    if (static_cast<size_t>(strangers) >= kMaxStrangers) return;  // closes fd
  } else if (known->left == 0) {
    return;
  }
  for (const Parked& p : parked)
    if (p.index == index && equal(p.token, token)) return;  // a second claim to the same place
  if (known != nullptr) --known->left;
  parked.push_back({token, index, std::move(fd), Clock::now() + kStrangerTime});
  changed.notify_all();
}

void TokenListener::State::read_preamble(Pending& connection) noexcept {
  if (connection.done) return;  // gave way in this turn
  while (connection.have < kPreambleBytes) {
    const ssize_t n = ::recv(connection.fd.get(), connection.bytes.data() + connection.have,
                             kPreambleBytes - connection.have, MSG_DONTWAIT);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) {
      connection.done = true;
      return;
    }
    connection.have += static_cast<size_t>(n);
  }
  connection.done = true;
  if (read_u32(connection.bytes.data() + 20) != kPreambleMagic) return;
  poller.remove(connection.fd.get());
  Token token;
  std::memcpy(token.data(), connection.bytes.data(), token.size());
  try {
    park(token, read_u32(connection.bytes.data() + 16), std::move(connection.fd));
  } catch (const std::exception& error) {
    log(LogLevel::kWarning, std::string("dropped an incoming connection: ") + error.what());
  }
}

void TokenListener::State::accept_all() noexcept {
  for (;;) {
    UniqueFd fd(::accept4(listening.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (!fd) {
      if (errno == EINTR || errno == ECONNABORTED || errno == EPROTO) continue;
      if (errno == EAGAIN) return;
      // Out of descriptors or memory: the connection stays in the backlog; look again a little later, not at once.
      poller.remove(listening.get());
      accepting = false;
      accept_again = Clock::now() + std::chrono::milliseconds(100);
      return;
    }
    make_room();
    Pending* connection = nullptr;
    try {
      connection = &pending.emplace_back();
      connection->fd = std::move(fd);
      connection->deadline = Clock::now() + kPreambleTime;
      poller.add(connection->fd.get(), EPOLLIN | EPOLLRDHUP, connection);
    } catch (const std::exception& error) {
      log(LogLevel::kWarning, std::string("dropped an incoming connection: ") + error.what());
      if (connection != nullptr) pending.pop_back();
      continue;
    }
    read_preamble(*connection);  // often there already: then it takes no place among the waiting
  }
}

// The longest silent one gives way, not the newcomer: a crowd of strangers must not shut out a peer. It stays in the
// list until sweep(), since an event of this turn may still point to it.
void TokenListener::State::make_room() noexcept {
  const auto waits = [](const Pending& p) { return !p.done; };
  if (static_cast<size_t>(std::count_if(pending.begin(), pending.end(), waits)) < kMaxPending) return;
  const auto oldest = std::find_if(pending.begin(), pending.end(), waits);
  oldest->done = true;
  oldest->fd.reset();
}

// Closes what waited too long; returns the milliseconds to the next thing to look at.
int TokenListener::State::sweep() noexcept {
  const Deadline now = Clock::now();
  Deadline next = now + std::chrono::seconds(1);
  std::erase_if(pending, [&](const Pending& p) { return p.done || p.deadline <= now; });
  for (const Pending& p : pending) next = std::min(next, p.deadline);
  if (!accepting) {
    if (accept_again <= now) {
      try {
        poller.add(listening.get(), EPOLLIN, this);
        accepting = true;
      } catch (const Error&) {
        accept_again = now + std::chrono::milliseconds(100);
      }
    }
    if (!accepting) next = std::min(next, accept_again);
  }
  const std::lock_guard lock(mutex);
  std::erase_if(parked, [&](const Parked& p) { return p.deadline <= now && find_expected(p.token) == nullptr; });
  return milliseconds_until(next);
}

void TokenListener::State::run() noexcept {
  std::array<Poller::Event, 64> events;
  int timeout = 1000;
  for (;;) {
    const size_t n = poller.wait(events, timeout);
    {
      const std::lock_guard lock(mutex);
      if (stopping) return;
    }
    for (size_t i = 0; i < n; ++i) {
      if (events[i].what == this)
        accept_all();
      else
        read_preamble(*static_cast<Pending*>(events[i].what));
    }
    timeout = sweep();
  }
}

std::pair<uint32_t, UniqueFd> TokenListener::State::take(const Token& token, const uint32_t* index, Deadline deadline) {
  std::unique_lock lock(mutex);
  for (;;) {
    if (stopping) throw Error(Code::kUnavailable, "take a connection: the listener is closing");
    if (find_expected(token) == nullptr)
      throw Error(Code::kUnavailable, "take a connection: its token is not expected (any more)");
    for (auto p = parked.begin(); p != parked.end(); ++p) {
      if ((index != nullptr && p->index != *index) || !equal(p->token, token)) continue;
      std::pair<uint32_t, UniqueFd> taken{p->index, std::move(p->fd)};
      parked.erase(p);
      return taken;
    }
    if (Clock::now() >= deadline)
      throw Error(Code::kTimeout,
                  "take a connection: the other end did not connect to " + local_address(listening.get()).to_string() +
                      " in time; is a firewall between?",
                  ETIMEDOUT);
    changed.wait_until(lock, deadline);
  }
}

TokenListener::TokenListener(UniqueFd listening, const std::string& name) : state_(std::make_shared<State>()) {
  state_->listening = std::move(listening);
  state_->poller.add(state_->listening.get(), EPOLLIN, state_.get());
  state_->thread = std::thread([state = state_.get()] { state->run(); });
  ::pthread_setname_np(state_->thread.native_handle(), name.substr(0, 15).c_str());
}

TokenListener::~TokenListener() {
  {
    const std::lock_guard lock(state_->mutex);
    state_->stopping = true;
    state_->changed.notify_all();
  }
  state_->poller.wake();
  state_->thread.join();
}

SocketAddress TokenListener::address() const { return local_address(state_->listening.get()); }

void TokenListener::expect(const Token& token, uint32_t connections) {
  const std::lock_guard lock(state_->mutex);
  if (state_->find_expected(token) != nullptr) return;
  const auto early = std::count_if(state_->parked.begin(), state_->parked.end(),
                                   [&](const State::Parked& p) { return equal(p.token, token); });
  state_->expected.push_back({token, connections - std::min(connections, static_cast<uint32_t>(early))});
}

UniqueFd TokenListener::take(const Token& token, uint32_t index, Deadline deadline) {
  const auto state = state_;  // outlives this object if it is destroyed while we wait
  return state->take(token, &index, deadline).second;
}

std::pair<uint32_t, UniqueFd> TokenListener::take_any(const Token& token, Deadline deadline) {
  const auto state = state_;
  return state->take(token, nullptr, deadline);
}

void TokenListener::forget(const Token& token) noexcept {
  const std::lock_guard lock(state_->mutex);
  std::erase_if(state_->expected, [&](const State::Expected& e) { return equal(e.token, token); });
  std::erase_if(state_->parked, [&](const State::Parked& p) { return equal(p.token, token); });
  state_->changed.notify_all();
}

}  // namespace pdxfer::sys
