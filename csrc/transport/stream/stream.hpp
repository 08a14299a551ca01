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
  // `ring`: through which device memory passes in place of the channel; null: none.
  Stream(LinkState& link, std::unique_ptr<Channel> channel, IoLoop& loop, DeviceLane& lane, uint32_t index,
         std::function<void()> on_failure, std::unique_ptr<SlotRing> ring);

  Turn turn() noexcept override;
  // Loop thread.
  void revoke(RegionId region, const Buffer& buffer);
  void release() noexcept;  // what the GPU does for it is over, its slots are free; the last thing before it goes
  // Bytes of device memory that one piece may have; any thread.
  uint64_t slot_bytes() const noexcept { return slot_bytes_; }
  // Does the other end read the slots themselves? Any thread.
  bool shares_slots() const noexcept { return ring_ != nullptr; }

  SendQueue& queue() noexcept { return sender_.queue(); }
  IoLoop& loop() noexcept { return loop_; }
  Channel& channel() noexcept { return *channel_; }

 private:
  void fail(int error, const char* malformed) noexcept;
  void close() noexcept;

  LinkState& link_;
  const std::unique_ptr<Channel> channel_;
  const std::unique_ptr<SlotRing> ring_;
  IoLoop& loop_;
  const std::function<void()> on_failure_;
  const uint64_t slot_bytes_;
  Sender sender_;
  Receiver receiver_;
  bool closed_ = false;
};

}  // namespace pdxfer::transport::stream
