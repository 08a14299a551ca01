// What the worker hands to io threads: Outbound, a batch on its way out, and SendQueue, the pieces of batches that one
// stream has still to send. A queue is bounded in bytes: what it does not take is back-pressure.
#pragma once

#include <atomic>
#include <bit>
#include <deque>
#include <mutex>
#include <optional>

#include "core/types.hpp"
#include "transport/stream/place.hpp"

namespace pdxfer::transport::stream {

// Made by the worker at a batch's first piece and dropped when its kSent was polled. Io threads read it only between
// the push of its first item and the flush of its END on the same stream, which `ends_left` counts.
struct Outbound {
  Outbound(BatchId number, const TransferPlan* what)
      : id(number), plan(what), copies(what == nullptr ? 0 : what->copies.size()) {}

  struct CopyState {
    std::vector<Place> places;  // of the source region of each pair; set before the first item
    uint64_t number = 0;        // of the copy, for DeviceLane; set with places
    uint64_t planned = 0;       // streams on which its PLAN goes first, one bit each; worker
    uint64_t epoch = 0;         // of the region table when it was last checked; worker
  };

  const BatchId id;
  const TransferPlan* const plan;  // null for a batch without copies
  std::vector<CopyState> copies;
  uint64_t streams = 0;  // used so far, one bit each; worker, and frozen by end()
  uint64_t bytes = 0;    // handed to queues; likewise
  std::optional<uint64_t> tag;
  Bytes tail;

  bool ended = false;            // its ENDs are queued; worker
  bool over = false;             // its kSent is queued; worker
  Status given_up;               // not ok: why this end gave it up; worker
  std::atomic<int32_t> stop{0};  // a Code: what is still queued is dropped and END says so
  // ENDs not yet written to their channels, and kAcked once the acknowledgement came: it can overtake the io thread
  // that has still to see its write return. The batch completes when both are done.
  static constexpr uint32_t kAcked = 1u << 31;
  std::atomic<uint32_t> ends_left{0};
  std::optional<Status> acked;  // worker
};

struct SendItem {
  Outbound* batch = nullptr;
  uint64_t bytes = 0;  // 0: this is the END
  Cursor cursor;
  uint64_t epoch = 0;
  uint32_t copy = 0;
  bool with_plan = false;
  int device = kHost;  // of the source; one for the whole piece
};

class SendQueue {
 public:
  explicit SendQueue(uint64_t capacity) : capacity_(capacity) {}

  // Worker. Bytes waiting, or UINT64_MAX when it takes no more pieces now.
  uint64_t load() noexcept {
    const std::lock_guard lock(mutex_);
    if (bytes_ < capacity_ && !closed_) return bytes_;
    starved_ = true;
    return UINT64_MAX;
  }
  // Worker. Pieces were admitted by load(); an END always fits. False once the stream is closed.
  bool push(const SendItem& item) {
    const std::lock_guard lock(mutex_);
    if (closed_) return false;
    items_.push_back(item);
    bytes_ += item.bytes;
    return true;
  }
  // Io thread. `hungry` becomes true when the worker was turned away and there is room again.
  bool pop(SendItem& item, bool& hungry) noexcept {
    const std::lock_guard lock(mutex_);
    if (items_.empty()) return false;
    item = items_.front();
    items_.pop_front();
    bytes_ -= item.bytes;
    if (starved_ && bytes_ <= capacity_ / 2) {
      starved_ = false;
      hungry = true;
    }
    return true;
  }
  void close() noexcept {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    items_.clear();
    bytes_ = 0;
  }

 private:
  const uint64_t capacity_;
  std::mutex mutex_;
  std::deque<SendItem> items_;
  uint64_t bytes_ = 0;
  bool starved_ = false, closed_ = false;
};

}  // namespace pdxfer::transport::stream
