// LinkState: what all streams of one link share, on both sides of the line between io threads and the worker: the
// region table, the inbound batches, the events for the worker, and whether and why the link is dead.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "core/types.hpp"
#include "transport/stream/frame.hpp"
#include "transport/stream/region_table.hpp"
#include "transport/transport.hpp"

namespace pdxfer::transport::stream {

// A batch of the other end on its way in, as all streams see it together. Guarded by LinkState's mutex.
struct Inbound {
  uint64_t streams_ended = 0;  // one bit each
  uint32_t streams = 0;        // that it uses, by its first END; 0: none yet
  uint64_t announced = 0;      // bytes, by its first END
  uint64_t received = 0;       // bytes, summed at each stream's END
  bool tagged = false;
  uint64_t tag = 0;
  Bytes tail;
  Status status;
  Refusal refusal = Refusal::kNone;
};

inline constexpr Status kSourceGone{Code::kInvalid, 0, "a source region was deregistered"};

// From io threads to the worker.
struct LinkEvent {
  enum class Kind : uint8_t { kAcked, kFlushed, kGivenUp, kArrived } kind = Kind::kAcked;
  BatchId batch = 0;
  Status status;
  Completion arrival;
};

class LinkState {
 public:
  LinkState(PeerId peer, RegionTable& regions, const Limits& limits, std::function<void()> wake, uint32_t streams);

  const PeerId peer;
  RegionTable& regions;
  const Limits limits;
  const std::function<void()> wake;
  const uint32_t streams;
  std::atomic<uint64_t> through_slots{0};  // bytes that this end handed over in slots of its ring

  // Io threads: inbound batches.
  // The batch, new or known; null when there are too many.
  std::shared_ptr<Inbound> open(BatchId batch);
  void refuse(Inbound& batch, Code code, Refusal why);
  bool refused(const Inbound& batch);
  // One stream's END. `ack` is filled when it was the last (the caller then calls wake()). Returns why the link must
  // die, or null.
  const char* end(uint32_t stream, const FrameHeader& header, Bytes tail, uint64_t received,
                  std::optional<FrameHeader>& ack);
  // May `bytes` of plans more be held for the other end?
  bool reserve_plan(uint64_t bytes) noexcept;
  void release_plan(uint64_t bytes) noexcept;

  void post(LinkEvent event);
  // What stands in the way of something, for explain() and the log; the last one counts.
  void note(std::string text);
  std::string noted() const;
  // Worker.
  bool take_events(std::vector<LinkEvent>& out);

  // The first reason stays. Any thread; the caller then kicks every stream.
  void fail(Status status);
  Status failure() const;
  bool failed() const noexcept { return failed_.load(std::memory_order_acquire); }
  // A stream sends and receives nothing any more. The last one turns half-arrived tagged batches into kPeerLost.
  void stream_closed();
  bool all_closed() const noexcept { return open_streams_.load(std::memory_order_acquire) == 0; }

 private:
  mutable std::mutex mutex_;
  std::map<BatchId, std::shared_ptr<Inbound>> inbound_;
  std::vector<LinkEvent> events_;
  Status failure_;
  std::string noted_;
  std::atomic<bool> failed_{false}, has_events_{false};
  std::atomic<uint32_t> open_streams_;
  std::atomic<uint64_t> plan_bytes_{0};
};

}  // namespace pdxfer::transport::stream
