// What two ends of an rdma link say to each other: the hello and the frames of the side connection (TCP), and the
// header of messages that travel over queue pairs. Little-endian, fixed sizes; decoded as a stranger's.
#pragma once

#include <cstring>
#include <string>

#include "core/codec.hpp"
#include "transport/rdma/rdma_rail.hpp"

namespace pdxfer::transport::rdma {

inline constexpr uint32_t kWireVersion = 2;

enum class MessageType : uint8_t { kPlan = 1, kChunk, kTail, kEnd, kAck, kCredit };

// In front of every message, whose body follows. Words by type:
//   kPlan   copy, pairs (of the whole plan), runs (likewise)         body: a piece of WirePair[] then WireRun[]
//   kChunk  copy, bytes, pair, run, slot, byte                       body: none; the payload is in the staging slot
//   kTail   -                                                        body: a piece of the tail
//   kEnd    tagged, status code (not kOk: given up), tag             body: the last piece of the tail
//   kAck    status code, native
//   kCredit -
struct MessageHeader {
  uint32_t sequence = 0;
  MessageType type = MessageType::kCredit;
  uint8_t reserved = 0;
  uint16_t body = 0;         // bytes
  uint32_t consumed = 0;     // messages of the other end that were processed here, without kCredit, so far
  uint32_t chunks_done = 0;  // staging slots of ours that the other end may fill again, counted from the first
  uint64_t batch = 0;
  uint32_t words[4] = {};
  uint64_t longs[2] = {};
};
static_assert(sizeof(MessageHeader) == 56);
inline constexpr size_t kMessageBody = kMessageBytes - sizeof(MessageHeader);

struct WirePair {
  uint64_t offset, stride, slot_bytes;
  uint32_t region, reserved;
};
struct WireRun {
  uint32_t slot, count;
};
inline constexpr uint32_t kMaxPairs = 65536, kMaxRuns = 1u << 22, kMaxCopies = 1024;

// Frames of the side connection.
enum class FrameType : uint32_t { kDown = 1, kOffer, kAnswer, kReady };
struct Frame {
  FrameType type = FrameType::kDown;
  uint32_t rail = 0, generation = 0;
  QpAddress qp;
  uint32_t reserved[3] = {};
};
static_assert(sizeof(Frame) == 32);

// First words of both ends on the side connection.
struct Hello {
  std::vector<QpAddress> rails;  // in the connecting end's order of pairs
  uint64_t staging = 0;          // virtual address of the slots that the other end may fill
  uint32_t slots = 0, slot_bytes = 0;
  std::vector<uint32_t> rkeys;  // of the staging, by our port
};
Bytes encode_hello(const Hello& hello);
Hello decode_hello(ByteView bytes, size_t rails, size_t ports);  // throws Error(kUnavailable)

// register_memory's key.
Bytes encode_region_key(uint64_t address, std::span<const uint32_t> rkeys);
struct RegionKey {
  uint64_t address = 0;
  std::vector<uint32_t> rkeys;  // by the owner's port
};
RegionKey decode_region_key(ByteView bytes, size_t ports);  // throws Error(kInvalid)

}  // namespace pdxfer::transport::rdma
