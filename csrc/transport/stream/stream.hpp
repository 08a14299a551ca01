// Stream: one channel with its Sender and Receiver, driven by one io loop. Made and removed by StreamPeer.
#pragma once

#include <functional>
#include <memory>

#include "transport/stream/io_loop.hpp"
#include "transport/stream/receiver.hpp"
#include "transport/stream/sender.hpp"

namespace pdxfer::transport::stream {

class Stream final : public Driven {
 public:
  // `on_failure` kicks every stream of the link, so that each closes on its own thread.
  Stream(LinkState& link, std::unique_ptr<Channel> channel, IoLoop& loop, uint32_t index,
         std::function<void()> on_failure);

  bool turn() noexcept override;
  // Loop thread.
  void revoke(RegionId region, const Buffer& buffer);

  SendQueue& queue() noexcept { return sender_.queue(); }
  IoLoop& loop() noexcept { return loop_; }
  Channel& channel() noexcept { return *channel_; }

 private:
  void fail(int error, const char* malformed) noexcept;
  void close() noexcept;

  LinkState& link_;
  const std::unique_ptr<Channel> channel_;
  IoLoop& loop_;
  const std::function<void()> on_failure_;
  Sender sender_;
  Receiver receiver_;
  bool closed_ = false;
};

}  // namespace pdxfer::transport::stream
