// Channel: an ordered, reliable pipe of bytes in both directions, without message boundaries. The stream protocol runs
// over it; a socket (tcp/) and a ring in shared memory (shm/) implement it. Called by the one io thread that drives it.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <span>
#include <string>

namespace pdxfer::transport::stream {

class Channel {
 public:
  virtual ~Channel() = default;

  // Neither call blocks, throws or allocates. Each returns the bytes moved (a prefix of what was asked), 0 when none
  // can be moved now, or -errno when the channel is dead; the other end's close is -EPIPE. `iov` holds at most
  // IOV_MAX entries and at least one byte.
  //
  // After a call returned 0, wait_fd() becomes readable or writable again (a fresh edge for edge-triggered epoll) as
  // soon as that direction can make progress or is dead. A shared-memory ring therefore publishes "I sleep" and looks
  // once more before it returns 0, and the other end then rings a doorbell that wait_fd() watches. Draining the
  // doorbell is the channel's own business, inside these calls.
  virtual int64_t writev(std::span<const iovec> iov) noexcept = 0;
  virtual int64_t readv(std::span<const iovec> iov) noexcept = 0;

  // Watched with EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET; every edge makes the io thread try both directions.
  virtual int wait_fd() const noexcept = 0;

  // Do bytes under way come within microseconds, so that looking for them is cheaper than being woken? So it is when
  // the other end is on this machine, and runs on another processor than the calling thread.
  virtual bool soon() const noexcept { return false; }

  // Bytes that travel together: what is written in multiples of it leaves no small remainder to be sent on its own.
  virtual uint64_t segment() const noexcept { return 1; }

  // The other end sees its channel die; later calls return -EPIPE. Idempotent. Must not close wait_fd() (the
  // destructor does) so that its number cannot be reused under the poller.
  virtual void shutdown() noexcept = 0;
};

}  // namespace pdxfer::transport::stream
