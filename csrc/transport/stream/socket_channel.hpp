// SocketChannel: a connected stream socket (TCP, or AF_UNIX within a machine) as the channel of a stream. Io thread,
// but for its making and end; owns the descriptor.
#pragma once

#include "sys/fd.hpp"
#include "transport/stream/channel.hpp"

namespace pdxfer::transport::stream {

class SocketChannel final : public Channel {
 public:
  // `nearby`: the other end is on this machine, at the other end of a TCP connection.
  explicit SocketChannel(sys::UniqueFd fd, bool nearby = false) noexcept : fd_(std::move(fd)), nearby_(nearby) {}

  int64_t writev(std::span<const iovec> iov) noexcept override;
  int64_t readv(std::span<const iovec> iov) noexcept override;
  int wait_fd() const noexcept override { return fd_.get(); }
  bool soon() const noexcept override;
  uint64_t segment() const noexcept override;
  void shutdown() noexcept override;

 private:
  const sys::UniqueFd fd_;
  const bool nearby_;
};

}  // namespace pdxfer::transport::stream
