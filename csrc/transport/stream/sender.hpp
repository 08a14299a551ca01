// Sender: the outgoing half of one stream. It turns queued pieces into frames, gathers headers and source extents into
// one window of iovecs, and writes windows to the channel: straight from the source, except where extents are so small
// that packing them is faster (small_extents.hpp), and from a pinned slot where the source is device memory
// (gathers.hpp). Its io thread only, except queue().
#pragma once

#include <sys/uio.h>

#include <array>
#include <chrono>
#include <deque>
#include <vector>

#include "core/copy_choice.hpp"
#include "transport/stream/channel.hpp"
#include "transport/stream/gathers.hpp"
#include "transport/stream/link_state.hpp"
#include "transport/stream/outbound.hpp"
#include "transport/stream/small_extents.hpp"

namespace pdxfer::transport::stream {

class Sender {
 public:
  // `ring`: null, or device memory goes through its slots in place of the channel.
  Sender(LinkState& link, Channel& channel, uint32_t index, DeviceLane& lane, SlotRing* ring);

  SendQueue& queue() noexcept { return queue_; }
  void push_ack(const FrameHeader& ack) { acks_.push_back(ack); }
  void push_credit(uint32_t slot);
  bool on_credit(uint64_t slot) noexcept;  // false when that slot was not lent
  // Writes about `budget` bytes. 1: more to do at once; 0: nothing to send, or the channel is full; else -errno.
  // `moved` becomes true when anything was written.
  int pump(uint64_t budget, bool& moved);
  // From now on nothing reads the region: what the window holds of it is copied out, what follows is sent as zeros.
  void revoke(RegionId region, const Buffer& buffer);
  void close() noexcept;
  // Only the GPU, or a slot that comes free, says when to go on.
  bool waits_for_device() const noexcept { return gathers_.waiting(); }

 private:
  void fill();
  void pack();
  void tell(int64_t written) noexcept;
  bool begin_next();
  void take_ahead();
  void append(const void* data, uint64_t bytes) noexcept;
  void append_header(const FrameHeader& header) noexcept;
  void append_end(Outbound& batch);
  void append_plan() noexcept;
  void append_extents() noexcept;
  void append_slot(FrameHeader header) noexcept;
  void consume(uint64_t bytes);

  LinkState& link_;
  Channel& channel_;
  const uint32_t index_;
  SlotRing* const ring_;
  SendQueue queue_;
  std::deque<FrameHeader> acks_;
  Gathers gathers_;

  // The frame under way.
  SendItem item_;
  bool in_plan_ = false, in_chunk_ = false;
  bool zeros_ = false;               // the source is gone, the bytes are promised
  uint32_t slot_ = SlotPool::kNone;  // that holds the chunk's bytes
  size_t plan_pair_ = 0, plan_run_ = 0;
  uint64_t left_ = 0;  // of the chunk's payload, not yet in a window

  // The window under way: what is between iov_[at_] and iov_[end_] waits for the channel.
  std::array<iovec, 1024> iov_;
  size_t at_ = 0, end_ = 0;
  uint64_t window_ = 0;             // bytes in it when it was filled
  uint64_t goal_ = 0;               // and how many it was to have: whole segments of the channel
  std::vector<std::byte> scratch_;  // headers and plans of the window
  size_t scratch_used_ = 0;
  PackBuffer packed_;            // the window, when its extents are small
  CopyChoice smallest_, small_;  // extents' way into the channel
  CopyChoice* timed_ = nullptr;  // that learns from the window's first write
  CopyWay way_{};                // the window's
  std::chrono::steady_clock::time_point filled_;
  std::vector<Outbound*> ends_;   // whose END is in the window
  std::vector<uint32_t> slots_;   // that the window points to
  std::vector<Bytes> snapshots_;  // of revoked regions, while the window points there
};

}  // namespace pdxfer::transport::stream
