// Receiver: the incoming half of one stream. It checks every frame, and reads the payload of chunks straight into the
// registered memory that their PLAN names (through a buffer in cache where extents are small, small_extents.hpp, and
// through pinned slots where it is device memory, scatters.hpp); what must not land is read into a sink. Its io thread
// only.
#pragma once

#include <sys/uio.h>

#include <array>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

#include "transport/stream/channel.hpp"
#include "transport/stream/link_state.hpp"
#include "transport/stream/scatters.hpp"
#include "transport/stream/sender.hpp"
#include "transport/stream/small_extents.hpp"

namespace pdxfer::transport::stream {

class Receiver {
 public:
  Receiver(LinkState& link, Channel& channel, Sender& acks, uint32_t index, DeviceLane& lane, SlotRing* ring);

  // Reads about `budget` bytes. 1: more to do at once; 0: the channel is empty; -errno: it is dead, or -EPROTO: a frame
  // was malformed and malformed() says how. `moved` becomes true when anything came, or was over on the GPU.
  int pump(uint64_t budget, bool& moved);
  const char* malformed() const noexcept { return malformed_; }
  // From now on nothing of ours is written to the region.
  void revoke(RegionId region);
  void close() noexcept;
  // Something has begun to arrive and is not over.
  bool under_way() const noexcept { return !batches_.empty() || header_have_ > 0; }
  // Only the GPU, or a slot that comes free, says when to go on.
  bool waits_for_device() const noexcept { return !scatters_.empty() || starved_; }

 private:
  enum class Stage : uint8_t { kHeader, kPlan, kPayload, kTail };

  bool turn_away(const char* why) noexcept;
  InboundBatch* open(BatchId id);
  bool on_header();
  bool begin_plan();
  bool begin_chunk();
  bool find_place();
  bool take_slot();
  uint64_t place_from_slot(uint32_t slot, uint64_t at, uint64_t bytes);
  bool finish_end();
  bool end(InboundBatch& batch);
  bool finish_scatters(bool& moved);
  void return_slots();
  void parse_plan(size_t bytes);
  void finish_plan();
  void fill();
  void fill_host();
  void fill_slot();
  void flush_slot(bool all);
  void drop_slot() noexcept;
  void consume(uint64_t bytes, const std::byte* packed);
  int64_t read_some();

  LinkState& link_;
  Channel& channel_;
  Sender& acks_;
  const uint32_t index_;
  SlotRing* const ring_;
  const char* malformed_ = nullptr;
  std::unordered_map<BatchId, InboundBatch> batches_;
  Scatters scatters_;
  std::vector<InboundBatch*> ended_;  // scratch

  Stage stage_ = Stage::kHeader;
  std::array<std::byte, kHeaderBytes> header_bytes_{};
  size_t header_have_ = 0;
  FrameHeader header_;
  InboundBatch* batch_ = nullptr;  // of the frame under way
  InboundPlan* plan_ = nullptr;    // likewise
  uint64_t unread_ = 0;            // of the frame's body, not yet read
  Bytes tail_;

  // PLAN: what was read and not yet parsed. Otherwise the sink.
  std::vector<std::byte> scratch_;
  size_t scratch_have_ = 0;

  // CHUNK: where the next bytes go.
  std::array<iovec, 1024> iov_;
  size_t at_ = 0, end_ = 0;
  uint64_t unfilled_ = 0;  // of the payload, not yet in the window
  uint64_t window_ = 0;    // bytes left in the window
  Cursor cursor_;
  bool sink_ = false;
  bool packing_ = false;  // this window is read into packed_ and scattered from there
  PackBuffer packed_;

  // CHUNK into device memory: the slot that the window is, its bytes' place in the plan, and how many came.
  uint32_t slot_ = SlotPool::kNone;
  Cursor slot_cursor_;
  uint64_t slot_size_ = 0, slot_have_ = 0;
  bool starved_ = false;  // there was no slot
};

}  // namespace pdxfer::transport::stream
