// The two system calls of the data path; see socket_channel.hpp.
#include <sys/socket.h>

#include <cerrno>

#include "transport/tcp/socket_channel.hpp"

namespace pdxfer::transport {
namespace {
msghdr message(std::span<const iovec> iov) noexcept {
  msghdr header{};
  header.msg_iov = const_cast<iovec*>(iov.data());
  header.msg_iovlen = iov.size();
  return header;
}
}  // namespace

int64_t SocketChannel::writev(std::span<const iovec> iov) noexcept {
  const msghdr header = message(iov);
  for (;;) {
    const ssize_t n = ::sendmsg(fd_.get(), &header, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n >= 0) return n;
    if (errno == EAGAIN) return 0;
    if (errno != EINTR) return -errno;
  }
}

int64_t SocketChannel::readv(std::span<const iovec> iov) noexcept {
  msghdr header = message(iov);
  for (;;) {
    const ssize_t n = ::recvmsg(fd_.get(), &header, MSG_DONTWAIT);
    if (n > 0) return n;
    if (n == 0) return -EPIPE;
    if (errno == EAGAIN) return 0;
    if (errno != EINTR) return -errno;
  }
}

void SocketChannel::shutdown() noexcept { ::shutdown(fd_.get(), SHUT_RDWR); }

}  // namespace pdxfer::transport
