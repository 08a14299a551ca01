// Frames of the control connection: the unit of the handshake and of what follows it (regions, heartbeats, goodbye).
// Bulk data never travels here; transports have connections of their own.
//
//   offset 0  u32 magic "PDX1" | u16 wire version | u16 type | u32 payload bytes | payload
//
// FrameReader is fed by strangers (tests/fuzz): it checks every field before it allocates, and allocates no more than
// the limit in force: kMaxGreeting until the peer is authenticated, kMaxFrame after.
#pragma once

#include <optional>

#include "core/types.hpp"

namespace pdxfer::engine {

inline constexpr uint32_t kMagic = 0x31584450;  // "PDX1" in memory
inline constexpr uint16_t kWireVersion = 1;
inline constexpr uint32_t kHeaderBytes = 12;
inline constexpr uint32_t kMaxGreeting = 4096;
inline constexpr uint32_t kMaxFrame = 256 * 1024;  // a region's key may take 64 KiB, an offer a few addresses

enum class FrameType : uint16_t {
  kHello = 1,       // instance, nonce, has_secret, name
  kReject = 2,      // code, text: the other end refuses, and closes
  kProof = 3,       // HMAC over both hellos; empty without a secret
  kOffer = 4,       // transports and their addresses
  kTry = 5,         // transport, token: both ends now call Transport::connect
  kResult = 6,      // ok, reason
  kChosen = 7,      // transport
  kRegion = 8,      // id, address, bytes, device, key
  kSync = 9,        // all regions of the moment were sent
  kForget = 10,     // region id: its owner wants it back
  kForgotten = 11,  // region id: nothing of ours will touch it again
  kPing = 12,
  kGoodbye = 13,  // orderly close; text says why
};

struct Frame {
  FrameType type{};
  Bytes payload;
};

Bytes encode_frame(FrameType type, ByteView payload, uint16_t version = kWireVersion);

// The text and code of a kReject or kGoodbye payload; tolerant of garbage.
struct Refusal {
  Code code = Code::kUnavailable;
  std::string text;
};
Bytes encode_refusal(Code code, std::string_view text);
Refusal decode_refusal(ByteView payload);

class FrameReader {
 public:
  explicit FrameReader(uint32_t max_payload) : max_payload_(max_payload) {}
  void allow(uint32_t max_payload) noexcept { max_payload_ = max_payload; }
  // Append what the socket gave. Bounded: callers stop reading while next() has frames.
  void feed(ByteView data) { buffer_.insert(buffer_.end(), data.begin(), data.end()); }
  // The next whole frame. Throws Error(kUnavailable): not our protocol, another version, or too large.
  std::optional<Frame> next();

 private:
  uint32_t max_payload_;
  Bytes buffer_;
  size_t start_ = 0;  // bytes of buffer_ already handed out
};

}  // namespace pdxfer::engine
