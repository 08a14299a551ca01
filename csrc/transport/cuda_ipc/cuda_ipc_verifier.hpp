// Verifier: the receiving end of a link's batches with checksums. It is told of each batch's destination (kPlan) and of
// what has landed (kLanded), reads that on this end's GPU while more is under way, and compares the sum with the
// sender's (kSum) before the batch's end (kEnd) is acted on. Made by the link with the first such batch; everything
// runs under the link's mutex, and nothing waits for the device but the destructor.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <unordered_map>
#include <vector>

#include "transport/cuda_ipc/cuda_ipc_wire.hpp"
#include "transport/transport.hpp"

namespace pdxfer::transport::cuda_ipc {

struct Core;

inline constexpr size_t kPlanPart = 48 << 10;       // bytes of a plan in one kPlan
inline constexpr uint64_t kMostPlans = 1ull << 30;  // bytes of unfinished plans per link
inline constexpr size_t kMostUnverified = 1 << 16;  // batches per link
inline constexpr Status kCorrupted{Code::kCorrupt, 0,
                                   "checksum: what landed at the receiving end is not what was sent"};

// The destination's side of a copy, as kPlan carries it: stream::WirePair and WireRun, in parts of kPlanPart.
Bytes encode_destination(const PagedCopy& copy);
// A batch's sum from those of its copies: each has a weight of its own, so that none can stand for another.
constexpr uint64_t weighted(uint32_t copy, uint64_t sum) noexcept { return sum * (2 * uint64_t{copy} + 1); }

class Verifier {
 public:
  Verifier(Core& core, std::unique_ptr<DeviceCopy> reader) : core_(core), reader_(std::move(reader)) {}

  // Messages. Not ok (kPeerLost): malformed, the link is over. What is well formed and not allowed fails its batch.
  Status plan(const Header& header, ByteView body);
  Status landed(const Header& header);
  Status sum(const Header& header);
  void give_up(BatchId batch);  // its sender did: no end will come
  bool holds(BatchId batch) const { return batches_.contains(batch); }
  void end(const Header& header, ByteView tail);  // of a batch that it holds

  struct Verdict {
    Header end;
    Bytes tail;
    Status status;
  };
  // Goes on with what can go on; the batches that are over, in the order in which they ended.
  std::vector<Verdict> settle();
  bool busy() const noexcept { return !pieces_.empty() || !ended_.empty(); }

  // What was launched before this call: read no more when over(). A region that is gone from Core::regions is not read
  // by anything launched later.
  DeviceTicket launched() const noexcept { return launched_; }
  bool over(DeviceTicket ticket);
  void drop_all() noexcept;  // the link is lost: nobody waits for an answer

 private:
  struct Part {  // one copy of a batch
    Bytes wire;  // of its plan, until all of it has come
    uint32_t pairs = 0, runs = 0;
    PagedCopy copy;  // its destination's side
    DeviceTables tables = 0;
    uint64_t generation = 0;  // of Core::regions, when they were prepared
    Cursor cursor;            // how far it is read,
    uint64_t landed = 0;      // and how many bytes beyond that may be
    uint64_t sum = 0;
  };
  struct Inbound {
    std::map<uint32_t, Part> parts;
    std::optional<uint64_t> sum;  // the sender's
    std::optional<Header> end;
    Bytes tail;
    Status status;
    uint32_t under_way = 0;  // pieces
  };
  struct Piece {
    DeviceTicket ticket = 0;
    BatchId batch = 0;
    uint32_t copy = 0;
  };

  void begin_part(Inbound& batch, Part& part);
  Status prepare(Part& part);
  void read_on(BatchId id, Inbound& batch);
  void release(Inbound& batch) noexcept;
  static Status verdict(const Inbound& batch);

  Core& core_;
  const std::unique_ptr<DeviceCopy> reader_;
  std::unordered_map<BatchId, Inbound> batches_;
  std::deque<BatchId> ended_;
  std::deque<Piece> pieces_;  // under way, in the order of their launch
  DeviceTicket launched_ = 0;
  uint64_t plan_bytes_ = 0;  // of batches_
  Status broken_;            // the device failed
};

}  // namespace pdxfer::transport::cuda_ipc
