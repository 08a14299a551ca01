// Frames: what travels on a stream. A 64-byte little-endian header, then `body` bytes. docs/design/wire.md is the
// specification; encode and decode here are the only code that knows the layout. Io threads.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "core/types.hpp"

namespace pdxfer::transport::stream {

static_assert(std::endian::native == std::endian::little,
              "the wire is little-endian and headers are copied as they are");

inline constexpr uint32_t kFrameMagic = 0x53584450;  // "PDXS"
inline constexpr uint32_t kFrameVersion = 1;

// Bounds of what a frame may announce; a link whose frame breaks one is closed.
inline constexpr uint32_t kMaxPairs = 1 << 20;
inline constexpr uint32_t kMaxRuns = 1 << 24;
inline constexpr uint32_t kMaxCopies = 4096;
inline constexpr uint64_t kMaxChunk = 128 << 20;
inline constexpr uint32_t kMaxStreams = 64;

enum class FrameType : uint16_t {
  kPlan = 1,
  kChunk = 2,
  kEnd = 3,
  kAck = 4,
  kSlot = 5,    // a chunk whose bytes lie in a slot of the sender's ring (slot_ring.hpp)
  kCredit = 6,  // that slot, given back
};
inline constexpr uint16_t kTagged = 1;  // flags of END

struct FrameHeader {
  uint32_t magic = kFrameMagic;
  FrameType type = FrameType::kPlan;
  uint16_t flags = 0;
  uint64_t batch = 0;
  uint64_t body = 0;    // bytes after this header
  uint32_t copy = 0;    // PLAN, CHUNK, SLOT: which copy of the batch's plan
  uint32_t words[3]{};  // PLAN: pairs, runs. CHUNK, SLOT: pair, run, slot. END: code, streams. ACK: code, refusal
  uint64_t count = 0;   // CHUNK, SLOT: byte within the slot. END: payload bytes of the batch on all streams
  uint64_t tag = 0;     // END: its tag. SLOT: its bytes, and its number in the upper half. CREDIT: its number
  uint32_t version = kFrameVersion;
  uint32_t reserved = 0;
};
inline constexpr size_t kHeaderBytes = 64;
static_assert(sizeof(FrameHeader) == kHeaderBytes && std::is_trivially_copyable_v<FrameHeader>);

struct WirePair {  // destination side of a RegionPair
  uint32_t region = 0, reserved = 0;
  uint64_t offset = 0, stride = 0, slot_bytes = 0;
};
struct WireRun {
  uint32_t slot = 0, count = 0;
};
static_assert(sizeof(WirePair) == 32 && sizeof(WireRun) == 8);

// A plan's destination as it travels, here and in cuda_ipc's kPlan. What is read back has no source; a pair whose
// reserved word is in use names no region, which whoever checks the plan refuses.
inline WirePair wire_of(const RegionPair& p) noexcept { return {p.dst, 0, p.dst_offset, p.dst_stride, p.slot_bytes}; }
inline WireRun wire_of(const Run& r) noexcept { return {r.dst_slot, r.count}; }
inline RegionPair from_wire(const WirePair& w) noexcept {
  return {kNoId, w.reserved == 0 ? w.region : kNoId, 0, w.offset, w.slot_bytes, w.stride, w.slot_bytes};
}
inline Run from_wire(const WireRun& w) noexcept { return {0, w.slot, w.count}; }

// Why a receiver refuses a batch, in ACK.words[1]; both ends know the texts.
enum class Refusal : uint32_t {
  kNone,
  kUnknownRegion,
  kRange,
  kPlan,
  kChunk,
  kCount,
  kDeregistered,
  kCrowded,
  kSender,
  kDevice,
  kStaging
};
const char* refusal_text(Refusal refusal) noexcept;
// The status of a batch as its receiver reported it; words that no receiver of ours sends read as kInternal.
Status status_from_wire(uint32_t code, uint32_t refusal) noexcept;

// nullptr when the header is well-formed, else why not.
const char* decode_header(const std::byte* bytes, uint64_t max_tail, FrameHeader& header) noexcept;

}  // namespace pdxfer::transport::stream
