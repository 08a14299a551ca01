// SOCK_SEQPACKET and SCM_RIGHTS; see seqpacket.hpp.
#include "sys/seqpacket.hpp"

#include <poll.h>
#include <sys/socket.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <thread>
#include <utility>

#include "core/status.hpp"

namespace pdxfer::sys {
namespace {

UniqueFd make_socket() {
  UniqueFd fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!fd) throw Error(Code::kUnavailable, "socket(AF_UNIX, SOCK_SEQPACKET): " + errno_name(errno), errno);
  return fd;
}

}  // namespace

UniqueFd listen_seqpacket(const std::string& name) {
  UniqueFd fd = make_socket();
  const SocketAddress address = abstract_address(name);
  if (::bind(fd.get(), reinterpret_cast<const sockaddr*>(&address.storage), address.length) != 0 ||
      ::listen(fd.get(), 256) != 0)
    throw Error(Code::kUnavailable, "listening on " + address.to_string() + ": " + errno_name(errno), errno);
  return fd;
}

UniqueFd connect_seqpacket(const std::string& name, Deadline deadline) {
  const SocketAddress address = abstract_address(name);
  for (;;) {
    UniqueFd fd = make_socket();
    if (::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address.storage), address.length) == 0) return fd;
    // A full backlog is EAGAIN, not EINPROGRESS, on AF_UNIX.
    if (errno != EAGAIN && errno != EINTR)
      throw Error(Code::kUnavailable, "connecting to " + address.to_string() + ": " + errno_name(errno), errno);
    if (Clock::now() >= deadline)
      throw Error(Code::kTimeout, "connecting to " + address.to_string() + ": its queue stayed full", EAGAIN);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

int send_message(int fd, std::span<const iovec> parts, std::span<const int> fds) noexcept {
  if (fds.size() > kMaxFds) return EMSGSIZE;
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int) * kMaxFds)> control;
  msghdr message{};
  message.msg_iov = const_cast<iovec*>(parts.data());
  message.msg_iovlen = parts.size();
  if (!fds.empty()) {
    const size_t bytes = fds.size_bytes();
    std::memset(control.data(), 0, CMSG_SPACE(bytes));
    message.msg_control = control.data();
    message.msg_controllen = CMSG_SPACE(bytes);
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(bytes);
    std::memcpy(CMSG_DATA(header), fds.data(), bytes);
  }
  for (;;) {
    if (::sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0) return 0;
    if (errno != EINTR) return errno;
  }
}

int64_t recv_message(int fd, std::span<std::byte> into, std::vector<UniqueFd>* fds) {
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int) * kMaxFds)> control;
  iovec part{into.data(), into.size()};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  ssize_t n = 0;
  // A socket whose other end closed with messages of ours unread says that, once, before it hands on what that end
  // sent.
  bool reset = false;
  do {
    n = ::recvmsg(fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  } while (n < 0 && (errno == EINTR || (errno == ECONNRESET && !std::exchange(reset, true))));
  if (n < 0) return -errno;
  std::vector<UniqueFd> received;
  for (cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr; header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    received.reserve(received.size() + count);
    for (size_t i = 0; i < count; ++i) {
      int number = -1;
      std::memcpy(&number, CMSG_DATA(header) + i * sizeof number, sizeof number);
      received.emplace_back(number);
    }
  }
  if (message.msg_flags & MSG_TRUNC) return -EMSGSIZE;
  if (message.msg_flags & MSG_CTRUNC) return -EMFILE;
  if (fds)
    for (UniqueFd& each : received) fds->push_back(std::move(each));
  return n;
}

void wait_readable(int fd, Deadline deadline, const char* what) {
  pollfd waiting{fd, POLLIN, 0};
  for (;;) {
    const int n = ::poll(&waiting, 1, milliseconds_until(deadline));
    if (n > 0) return;
    if (n < 0 && errno == EINTR) continue;
    throw Error(Code::kTimeout, std::string(what) + ": nothing came in time", ETIMEDOUT);
  }
}

int peer_process(int fd) noexcept {
  ucred credentials{};
  socklen_t bytes = sizeof credentials;
  if (::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &credentials, &bytes) != 0) return 0;
  return credentials.pid;
}

}  // namespace pdxfer::sys
