// Stream sockets with deadlines: TCP over IPv4 and IPv6, and abstract AF_UNIX names. Used by the engine's control
// connection and by transports at set-up; any thread. Every socket made here is non-blocking and close-on-exec, and
// every call that waits has a deadline. All throw Error: kInvalid for a bad address, kUnavailable when the other end
// cannot be reached or the name is taken, kTimeout at the deadline, kPeerLost when the other end closed.
#pragma once

#include <sys/socket.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "sys/fd.hpp"

namespace pdxfer::sys {

using Clock = std::chrono::steady_clock;
using Deadline = Clock::time_point;

// Milliseconds left, at least 0, for poll(2) and epoll_wait(2); rounded up so that a wait never spins.
int milliseconds_until(Deadline deadline) noexcept;

struct SocketAddress {
  sockaddr_storage storage{};
  socklen_t length = 0;

  int family() const noexcept { return storage.ss_family; }
  std::string host() const;       // "127.0.0.1", "::1", "fe80::1%eth0"; for AF_UNIX "@name"
  uint16_t port() const;          // 0 for AF_UNIX
  bool wildcard() const;          // 0.0.0.0 or ::
  std::string to_string() const;  // "127.0.0.1:80", "[::1]:80", "@name"
};

// "127.0.0.1:80", "[::1]:80", "name:80" -> host and port. Throws Error(kInvalid).
std::pair<std::string, uint16_t> split_host_port(std::string_view text);
std::string join_host_port(std::string_view host, uint16_t port);

// Every address of a numeric host or a name, in the resolver's order. A name asks the system's resolver, whose own
// time-out is the only bound; a numeric host never leaves this process.
std::vector<SocketAddress> resolve(const std::string& host, uint16_t port);
// A name in Linux's abstract namespace (no file, gone with its last socket). At most 107 bytes.
SocketAddress abstract_address(std::string_view name);

UniqueFd listen_on(const SocketAddress& address, int backlog = 256);
UniqueFd listen_on(const std::string& host, uint16_t port, int backlog = 256);
UniqueFd connect_to(const SocketAddress& address, Deadline deadline);
// Tries each address of the host in turn; the error names all of them.
UniqueFd connect_to(const std::string& host, uint16_t port, Deadline deadline);
UniqueFd accept_from(int listening, Deadline deadline);

void send_exact(int fd, std::span<const std::byte> bytes, Deadline deadline);
void recv_exact(int fd, std::span<std::byte> bytes, Deadline deadline);

SocketAddress local_address(int fd);
SocketAddress remote_address(int fd);

// setsockopt with an int; throws Error(kUnavailable) naming `what`.
void set_option(int fd, int level, int option, int value, const char* what);

}  // namespace pdxfer::sys
