// The words of the project: regions, pairs, runs, the factorised copy, batches and completions.
// Everything above core/ speaks in these; nothing here does I/O, allocates on the data path or starts a thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "core/status.hpp"

namespace pdxfer {

using Bytes = std::vector<std::byte>;
using ByteView = std::span<const std::byte>;

inline constexpr int kHost = -1;  // Buffer::device for host memory

using RegionId = uint32_t;  // unique within one engine for its whole life; never reused
using PeerId = uint32_t;    // likewise
using BatchId = uint64_t;   // likewise
inline constexpr uint32_t kNoId = 0;

struct Buffer {
  std::byte* data = nullptr;
  uint64_t bytes = 0;
  int device = kHost;  // CUDA ordinal, or kHost
};

// A registered piece of memory, as its owner knows it and as its peers are told.
struct Region {
  RegionId id = kNoId;
  Buffer buffer;  // on a peer: `data` is the owner's virtual address, to be compared and never dereferenced
};

// One buffer on each side. Slot s of a side begins at offset + s * stride of its region.
struct RegionPair {
  RegionId src = kNoId, dst = kNoId;
  uint64_t src_offset = 0, dst_offset = 0;  // bytes from the region's first byte to slot 0
  uint64_t src_stride = 0, dst_stride = 0;  // bytes from one slot to the next
  uint64_t slot_bytes = 0;                  // bytes moved per slot; at most either stride
};

// `count` consecutive slots on both sides. A slot is a page, or a token where heads are re-sharded.
struct Run {
  uint32_t src_slot = 0, dst_slot = 0, count = 0;
  friend bool operator==(const Run&, const Run&) = default;
};

// Every run, in every pair: what a plan, the wire and a kernel all take as it is.
struct PagedCopy {
  std::vector<RegionPair> pairs;
  std::vector<Run> runs;

  // Derived once by seal() so that checks cost O(pairs) and progress needs no second pass. Empty runs, and totals that
  // do not fit 64 bits, set the ends to UINT64_MAX, which check_range refuses for every region.
  uint64_t slots = 0;                           // sum of run counts
  uint64_t bytes = 0;                           // total payload
  uint64_t src_slot_end = 0, dst_slot_end = 0;  // one past the highest slot used on each side

  void seal() noexcept;
};

// Components (KV, then each state list) each with their own pairs and runs; together one batch.
struct TransferPlan {
  std::vector<PagedCopy> copies;
  uint64_t bytes() const noexcept;
};

// A resumable position in a PagedCopy, in canonical order: pair, then run, then slot, then byte.
struct Cursor {
  uint32_t pair = 0, run = 0, slot = 0;  // slot counts within the run
  uint64_t byte = 0;                     // within the slot
  friend bool operator==(const Cursor&, const Cursor&) = default;
};

// What a batch became. The sender gets one kSent; the receiver one kArrived for a tagged batch.
struct Completion {
  enum class Kind : uint8_t { kSent, kArrived };
  Kind kind = Kind::kSent;
  PeerId peer = kNoId;
  BatchId batch = 0;  // the sender's number
  uint64_t tag = 0;
  Status status;
  Bytes tail;  // kArrived only: the small host bytes that rode in the notification
};

}  // namespace pdxfer
