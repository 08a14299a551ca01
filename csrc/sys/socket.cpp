// Sockets with deadlines; see socket.hpp.
#include "sys/socket.hpp"

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/un.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstddef>
#include <cstring>

#include "core/status.hpp"

namespace pdxfer::sys {
namespace {

[[noreturn]] void fail(Code code, const std::string& what, int error) {
  throw Error(code, what + ": " + errno_name(error), error);
}

// Waits until `fd` is ready or the deadline; false at the deadline.
bool wait_for(int fd, short events, Deadline deadline) {
  for (;;) {
    pollfd entry{fd, events, 0};
    const int n = ::poll(&entry, 1, milliseconds_until(deadline));
    if (n > 0) return true;
    if (n < 0 && errno != EINTR) fail(Code::kUnavailable, "poll", errno);
    if (Clock::now() >= deadline) return false;
  }
}

UniqueFd make_socket(int family) {
  UniqueFd fd(::socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!fd) fail(Code::kUnavailable, "socket (raise the limit of open files, ulimit -n, if it is too many)", errno);
  return fd;
}

const sockaddr* raw(const SocketAddress& address) noexcept {
  return reinterpret_cast<const sockaddr*>(&address.storage);
}

}  // namespace

int milliseconds_until(Deadline deadline) noexcept {
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now()).count();
  return static_cast<int>(std::clamp<int64_t>(left, 0, 1 << 30));
}

std::string SocketAddress::host() const {
  if (family() == AF_UNIX) {
    const auto* unix_address = reinterpret_cast<const sockaddr_un*>(&storage);
    const size_t bytes = length > offsetof(sockaddr_un, sun_path) ? length - offsetof(sockaddr_un, sun_path) : 0;
    return bytes == 0 ? "@" : "@" + std::string(unix_address->sun_path + 1, bytes - 1);
  }
  char text[NI_MAXHOST] = {};
  if (::getnameinfo(raw(*this), length, text, sizeof text, nullptr, 0, NI_NUMERICHOST) != 0) return "?";
  return text;
}

uint16_t SocketAddress::port() const {
  if (family() == AF_INET) return ntohs(reinterpret_cast<const sockaddr_in*>(&storage)->sin_port);
  if (family() == AF_INET6) return ntohs(reinterpret_cast<const sockaddr_in6*>(&storage)->sin6_port);
  return 0;
}

bool SocketAddress::wildcard() const {
  if (family() == AF_INET) return reinterpret_cast<const sockaddr_in*>(&storage)->sin_addr.s_addr == INADDR_ANY;
  if (family() == AF_INET6)
    return IN6_IS_ADDR_UNSPECIFIED(&reinterpret_cast<const sockaddr_in6*>(&storage)->sin6_addr) != 0;
  return false;
}

std::string SocketAddress::to_string() const { return family() == AF_UNIX ? host() : join_host_port(host(), port()); }

std::string join_host_port(std::string_view host, uint16_t port) {
  const std::string text(host);
  return (text.find(':') != std::string::npos ? "[" + text + "]" : text) + ":" + std::to_string(port);
}

std::pair<std::string, uint16_t> split_host_port(std::string_view text) {
  const size_t colon = text.rfind(':');
  uint16_t port = 0;
  if (colon != std::string_view::npos && colon > 0) {
    std::string_view host = text.substr(0, colon);
    const std::string_view digits = text.substr(colon + 1);
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), port);
    const bool number = error == std::errc{} && end == digits.data() + digits.size() && !digits.empty();
    const bool bracketed = host.size() > 2 && host.front() == '[' && host.back() == ']';
    if (bracketed) host = host.substr(1, host.size() - 2);
    if (number && (bracketed || host.find(':') == std::string_view::npos)) return {std::string(host), port};
  }
  throw Error(Code::kInvalid, "address '" + std::string(text) + "': expected HOST:PORT, or [HOST]:PORT for IPv6");
}

std::vector<SocketAddress> resolve(const std::string& host, uint16_t port) {
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  const std::string service = std::to_string(port);
  addrinfo* found = nullptr;
  hints.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV;
  int rc = ::getaddrinfo(host.c_str(), service.c_str(), &hints, &found);
  if (rc == EAI_NONAME) {
    hints.ai_flags = AI_NUMERICSERV;
    rc = ::getaddrinfo(host.c_str(), service.c_str(), &hints, &found);
  }
  if (rc != 0)
    throw Error(Code::kUnavailable, "resolve host '" + host + "': " + ::gai_strerror(rc) + "; give a numeric address",
                rc);
  std::vector<SocketAddress> all;
  for (const addrinfo* info = found; info != nullptr; info = info->ai_next) {
    if (info->ai_addrlen > sizeof(sockaddr_storage)) continue;
    SocketAddress address;
    std::memcpy(&address.storage, info->ai_addr, info->ai_addrlen);
    address.length = info->ai_addrlen;
    all.push_back(address);
  }
  ::freeaddrinfo(found);
  return all;
}

SocketAddress abstract_address(std::string_view name) {
  SocketAddress address;
  auto* unix_address = reinterpret_cast<sockaddr_un*>(&address.storage);
  if (name.empty() || name.size() > sizeof(unix_address->sun_path) - 1)
    throw Error(Code::kInvalid, "abstract socket name '" + std::string(name) + "': expected 1 to 107 bytes");
  unix_address->sun_family = AF_UNIX;
  std::memcpy(unix_address->sun_path + 1, name.data(), name.size());
  address.length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  return address;
}

UniqueFd listen_on(const SocketAddress& address, int backlog) {
  UniqueFd fd = make_socket(address.family());
  if (address.family() != AF_UNIX) set_option(fd.get(), SOL_SOCKET, SO_REUSEADDR, 1, "SO_REUSEADDR");
  if (::bind(fd.get(), raw(address), address.length) != 0) {
    const int error = errno;
    const char* next = error == EADDRINUSE      ? " (choose another port, or 0 for any)"
                       : error == EADDRNOTAVAIL ? " (no interface of this machine has that address)"
                                                : "";
    fail(Code::kUnavailable, "listen on " + address.to_string() + next, error);
  }
  if (::listen(fd.get(), backlog) != 0) fail(Code::kUnavailable, "listen on " + address.to_string(), errno);
  return fd;
}

UniqueFd listen_on(const std::string& host, uint16_t port, int backlog) {
  return listen_on(resolve(host, port).at(0), backlog);
}

UniqueFd connect_to(const SocketAddress& address, Deadline deadline) {
  UniqueFd fd = make_socket(address.family());
  const std::string what = "connect to " + address.to_string();
  // An abstract name whose backlog is full answers EAGAIN and cannot be waited for with poll: try again shortly.
  while (::connect(fd.get(), raw(address), address.length) != 0) {
    if (errno == EISCONN) return fd;
    if (errno == EINPROGRESS) break;
    if (errno != EAGAIN && errno != EINTR) fail(Code::kUnavailable, what, errno);
    if (Clock::now() >= deadline) throw Error(Code::kTimeout, what + ": no answer in time", ETIMEDOUT);
    if (errno == EAGAIN) ::poll(nullptr, 0, 1);
  }
  if (!wait_for(fd.get(), POLLOUT, deadline)) throw Error(Code::kTimeout, what + ": no answer in time", ETIMEDOUT);
  int error = 0;
  socklen_t size = sizeof error;
  if (::getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, &error, &size) != 0) error = errno;
  if (error != 0) fail(Code::kUnavailable, what, error);
  return fd;
}

UniqueFd connect_to(const std::string& host, uint16_t port, Deadline deadline) {
  std::string tried;
  Code code = Code::kUnavailable;
  int native = 0;
  for (const SocketAddress& address : resolve(host, port)) {
    try {
      return connect_to(address, deadline);
    } catch (const Error& error) {
      code = error.code();
      native = error.status().native;
      tried += (tried.empty() ? "" : "; ") + std::string(error.what());
    }
  }
  throw Error(code, tried.empty() ? "connect to " + host + ": it has no address" : tried, native);
}

UniqueFd accept_from(int listening, Deadline deadline) {
  for (;;) {
    UniqueFd fd(::accept4(listening, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (fd) return fd;
    // The client may be gone again; the errors of its connection are not ours.
    const bool transient = errno == EINTR || errno == ECONNABORTED || errno == EPROTO;
    if (!transient && errno != EAGAIN) fail(Code::kUnavailable, "accept", errno);
    if (errno == EAGAIN && !wait_for(listening, POLLIN, deadline))
      throw Error(Code::kTimeout, "accept: nobody connected in time", ETIMEDOUT);
  }
}

void send_exact(int fd, std::span<const std::byte> bytes, Deadline deadline) {
  while (!bytes.empty()) {
    const ssize_t n = ::send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n >= 0) {
      bytes = bytes.subspan(static_cast<size_t>(n));
    } else if (errno == EAGAIN) {
      if (!wait_for(fd, POLLOUT, deadline)) throw Error(Code::kTimeout, "send: the other end does not read", ETIMEDOUT);
    } else if (errno != EINTR) {
      fail(Code::kPeerLost, "send", errno);
    }
  }
}

void recv_exact(int fd, std::span<std::byte> bytes, Deadline deadline) {
  while (!bytes.empty()) {
    const ssize_t n = ::recv(fd, bytes.data(), bytes.size(), MSG_DONTWAIT);
    if (n > 0) {
      bytes = bytes.subspan(static_cast<size_t>(n));
    } else if (n == 0) {
      throw Error(Code::kPeerLost, "receive: the other end closed the connection", ECONNRESET);
    } else if (errno == EAGAIN) {
      if (!wait_for(fd, POLLIN, deadline))
        throw Error(Code::kTimeout, "receive: the other end sent nothing in time", ETIMEDOUT);
    } else if (errno != EINTR) {
      fail(Code::kPeerLost, "receive", errno);
    }
  }
}

SocketAddress local_address(int fd) {
  SocketAddress address;
  address.length = sizeof address.storage;
  if (::getsockname(fd, reinterpret_cast<sockaddr*>(&address.storage), &address.length) != 0)
    fail(Code::kUnavailable, "getsockname", errno);
  return address;
}

SocketAddress remote_address(int fd) {
  SocketAddress address;
  address.length = sizeof address.storage;
  if (::getpeername(fd, reinterpret_cast<sockaddr*>(&address.storage), &address.length) != 0)
    fail(Code::kUnavailable, "getpeername", errno);
  return address;
}

void set_option(int fd, int level, int option, int value, const char* what) {
  if (::setsockopt(fd, level, option, &value, sizeof value) != 0)
    fail(Code::kUnavailable, std::string("setsockopt ") + what + " to " + std::to_string(value), errno);
}

}  // namespace pdxfer::sys
