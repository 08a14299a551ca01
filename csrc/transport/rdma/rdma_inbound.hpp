// Inbound: the receiving half of a link: plans that the other end announced, chunks to scatter from our staging slots,
// and batches that end. Everything from the wire is checked before a byte is placed. Under the transport's mutex.
#pragma once

#include <map>
#include <unordered_map>

#include "transport/rdma/rdma_hub.hpp"
#include "transport/rdma/rdma_wire.hpp"

namespace pdxfer::transport::rdma {

class Inbound {
 public:
  Inbound(Hub& hub, PeerId peer, const std::byte* staging, uint32_t slots, uint32_t slot_bytes)
      : hub_(hub), peer_(peer), staging_(staging), slots_(slots), slot_bytes_(slot_bytes) {}

  struct Ended {
    bool ended = false;
    Status status;  // for the acknowledgement
    std::optional<Completion> arrival;
  };
  // One message, in order. Returns why the link must die, or null; `out` says whether a batch ended with it.
  const char* take(const MessageHeader& header, ByteView body, Ended& out);
  uint32_t chunks_done() const noexcept { return chunks_done_; }
  // The other end is gone: arrivals that can never complete.
  size_t unfinished() const noexcept { return batches_.size(); }

 private:
  struct Plan {
    uint32_t pairs = 0, runs = 0;
    PagedCopy copy;  // src: the packed stream; dst: our regions
    bool ready = false;
  };
  struct Batch {
    std::map<uint32_t, Plan> plans;
    Bytes tail;
    Status refused;
  };
  const char* on_plan(Batch& batch, const MessageHeader& header, ByteView body);
  const char* on_chunk(Batch& batch, const MessageHeader& header);
  void on_end(Batch& batch, const MessageHeader& header, Ended& out);
  static void refuse(Batch& batch, Status why) {
    if (batch.refused.ok()) batch.refused = why;
  }
  void finish(Batch& batch, Plan& plan);

  Hub& hub_;
  const PeerId peer_;
  const std::byte* const staging_;
  const uint32_t slots_, slot_bytes_;
  uint32_t chunks_done_ = 0;
  uint64_t plan_bytes_ = 0;
  std::unordered_map<BatchId, Batch> batches_;
  std::vector<std::byte*> src_, dst_;
};

// `copy` with its source replaced by the stream of its bytes in canonical order: slot s of a pair begins where s slots
// of it, and all pairs before it, end. Slots of runs are counted through. False when that does not fit.
bool number_stream(PagedCopy& copy, Side side) noexcept;

}  // namespace pdxfer::transport::rdma
