// One turn of a stream; see stream.hpp.
#include "transport/stream/stream.hpp"

#include <cerrno>
#include <exception>

namespace pdxfer::transport::stream {
namespace {
constexpr uint64_t kTurn = 2 << 20;  // bytes per direction before the loop looks after its other streams
}

Stream::Stream(LinkState& link, std::unique_ptr<Channel> channel, IoLoop& loop, uint32_t index,
               std::function<void()> on_failure)
    : link_(link),
      channel_(std::move(channel)),
      loop_(loop),
      on_failure_(std::move(on_failure)),
      sender_(link, *channel_, index),
      receiver_(link, *channel_, sender_, index) {}

bool Stream::turn() noexcept {
  if (closed_) return false;
  if (link_.failed()) {
    close();
    return false;
  }
  try {
    const int in = receiver_.pump(kTurn);
    if (in < 0) {
      fail(-in, receiver_.malformed());
      return false;
    }
    const int out = sender_.pump(kTurn);
    if (out >= 0) return in > 0 || out > 0;
    if (in > 0) return true;  // the other end is gone, but what it sent before is still to be read
    fail(-out, nullptr);
  } catch (const std::exception&) {
    fail(ENOMEM, "an io thread ran out of memory");
  }
  return false;
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
  sender_.close();
  receiver_.close();
  link_.stream_closed();
}

void Stream::revoke(RegionId region, const Buffer& buffer) {
  sender_.revoke(region, buffer);
  receiver_.revoke(region);
}

}  // namespace pdxfer::transport::stream
