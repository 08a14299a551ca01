// The system calls of the data path; see socket_channel.hpp.
#include "transport/stream/socket_channel.hpp"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif
#include <sys/socket.h>

#include <cerrno>

namespace pdxfer::transport::stream {
namespace {
// ThreadSanitizer forgets what a socket orders when one of its ends came as a descriptor in a message: it is told that
// what was received was sent before. A no-op elsewhere.
#if defined(__SANITIZE_THREAD__)
char mark;
void sending() noexcept { __tsan_release(&mark); }
void received() noexcept { __tsan_acquire(&mark); }
#else
void sending() noexcept {}
void received() noexcept {}
#endif

msghdr message(std::span<const iovec> iov) noexcept {
  msghdr header{};
  header.msg_iov = const_cast<iovec*>(iov.data());
  header.msg_iovlen = iov.size();
  return header;
}
}  // namespace

int64_t SocketChannel::writev(std::span<const iovec> iov) noexcept {
  const msghdr header = message(iov);
  sending();
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
    if (n > 0) return received(), n;
    if (n == 0) return -EPIPE;
    if (errno == EAGAIN) return 0;
    if (errno != EINTR) return -errno;
  }
}

// Within a machine the kernel handles what arrives on the processor of its sender.
bool SocketChannel::soon() const noexcept {
  if (!nearby_) return false;
  int cpu = -1;
  socklen_t length = sizeof cpu;
  if (::getsockopt(fd_.get(), SOL_SOCKET, SO_INCOMING_CPU, &cpu, &length) != 0 || cpu < 0) return false;
  return cpu != ::sched_getcpu();
}

// TCP's segment, which grows while a connection is young.
uint64_t SocketChannel::segment() const noexcept {
  int bytes = 0;
  socklen_t length = sizeof bytes;
  if (::getsockopt(fd_.get(), IPPROTO_TCP, TCP_MAXSEG, &bytes, &length) != 0 || bytes <= 0) return 1;
  return static_cast<uint64_t>(bytes);
}

void SocketChannel::shutdown() noexcept { ::shutdown(fd_.get(), SHUT_RDWR); }

}  // namespace pdxfer::transport::stream
