// SocketChannel: a connected stream socket (TCP, or AF_UNIX within a machine) as the channel of a stream. Io thread,
// but for its making and end; owns the descriptor.
#pragma once

#include "sys/fd.hpp"
#include "transport/stream/channel.hpp"

namespace pdxfer::transport::stream {

class SocketChannel final : public Channel {
 public:
  explicit SocketChannel(sys::UniqueFd fd) noexcept : fd_(std::move(fd)) {}

  int64_t writev(std::span<const iovec> iov) noexcept override;
  int64_t readv(std::span<const iovec> iov) noexcept override;
  int wait_fd() const noexcept override { return fd_.get(); }
  void shutdown() noexcept override;

 private:
  const sys::UniqueFd fd_;
};

}  // namespace pdxfer::transport::stream
