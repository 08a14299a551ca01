// One turn of a stream; see stream.hpp.
#include "transport/stream/stream.hpp"

#include <cerrno>
#include <exception>

namespace pdxfer::transport::stream {
namespace {
constexpr uint64_t kTurn = 2 << 20;  // bytes per direction before the loop looks after its other streams
}

Stream::Stream(LinkState& link, std::unique_ptr<Channel> channel, IoLoop& loop, DeviceLane& lane, uint32_t index,
               std::function<void()> on_failure, std::unique_ptr<SlotRing> ring)
    : link_(link),
      channel_(std::move(channel)),
      ring_(std::move(ring)),
      loop_(loop),
      on_failure_(std::move(on_failure)),
      slot_bytes_(ring_ ? ring_->outgoing().slot_bytes() : lane.slot_bytes()),
      sender_(link, *channel_, index, lane, ring_.get()),
      receiver_(link, *channel_, sender_, index, lane, ring_.get()) {}

Turn Stream::turn() noexcept {
  if (closed_) return Turn::kIdle;
  if (link_.failed()) {
    close();
    return Turn::kIdle;
  }
  try {
    bool moved = false;
    const int in = receiver_.pump(kTurn, moved);
    if (in < 0) {
      fail(-in, receiver_.malformed());
      return Turn::kIdle;
    }
    const int out = sender_.pump(kTurn, moved);
    // When the other end is gone, what it sent before is still to be read, and to be scattered.
    if (in > 0 || out > 0) return Turn::kAgain;
    // After progress the GPU is soon through with the next piece, too: the loop's patience begins anew.
    if (receiver_.waits_for_device() || (out >= 0 && sender_.waits_for_device()))
      return moved ? Turn::kAgain : Turn::kDevice;
    if (out < 0)
      fail(-out, nullptr);
    else if (receiver_.under_way() && channel_->soon())
      return Turn::kSoon;
  } catch (const std::exception&) {
    fail(ENOMEM, "an io thread ran out of memory");
  }
  return Turn::kIdle;
}

void Stream::fail(int error, const char* malformed) noexcept {
  const char* where = malformed != nullptr ? malformed
                      : error == EPIPE     ? "the other end closed the connection"
                      : error == ETIMEDOUT ? "the other end did not answer in time"
                                           : "a connection to the other end broke";
  link_.fail({Code::kPeerLost, error, where});
  close();
  on_failure_();
}

void Stream::close() noexcept {
  if (std::exchange(closed_, true)) return;
  channel_->shutdown();
  release();
  link_.stream_closed();
}

// In this order to the worker's eye: nothing reads or writes memory of a batch any more, then the link is closed.
void Stream::release() noexcept {
  sender_.close();
  receiver_.close();
}

void Stream::revoke(RegionId region, const Buffer& buffer) {
  sender_.revoke(region, buffer);
  receiver_.revoke(region);
}

}  // namespace pdxfer::transport::stream
