// SocketChannel: a connected stream socket as the channel of a stream. Io thread, but for its making and end.
#pragma once

#include "sys/fd.hpp"
#include "transport/stream/channel.hpp"

namespace pdxfer::transport {

class SocketChannel final : public stream::Channel {
 public:
  explicit SocketChannel(sys::UniqueFd fd) noexcept : fd_(std::move(fd)) {}

  int64_t writev(std::span<const iovec> iov) noexcept override;
  int64_t readv(std::span<const iovec> iov) noexcept override;
  int wait_fd() const noexcept override { return fd_.get(); }
  void shutdown() noexcept override;

 private:
  const sys::UniqueFd fd_;
};

}  // namespace pdxfer::transport
