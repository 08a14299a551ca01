// What shm puts on the wire at set-up: a region's key, and the messages of a link's socket.
// Everything is checked on the way in, since a peer may be another version. Any thread; owns nothing.
#pragma once

#include <string>

#include "core/codec.hpp"
#include "core/types.hpp"
#include "transport/local/local_socket.hpp"

namespace pdxfer::transport::shm {

inline constexpr uint32_t kVersion = 1;
inline constexpr local::Protocol kProtocol{"shm", 0x41584450, kVersion};  // "PDXA"

// A region's key: whether its owner can hand out descriptors of it, else why not.
struct Key {
  bool mappable = false;
  std::string refusal;

  Bytes encode() const;
  static Key decode(ByteView bytes);  // throws Error(kInvalid)
};

enum class Type : uint32_t {
  kHello = 1,  // set-up, in this order
  kProbe,
  kVerdict,
  kRing,
  kWant,      // region: send me its descriptors
  kSegments,  // region: they come with this message; code not ok: they cannot be had
  kRevoke,    // region: its owner wants it back; answer kRevoked when nothing of yours can write to it any more
  kRevoked,
  kEnd,  // batch, tagged, tag, tail: every byte of the batch is in place
  kAck,  // batch, code
};

// The fixed part of every message; some are followed by bytes.
struct Header {
  Type type{};
  uint32_t region = 0;
  uint64_t batch = 0, tag = 0;
  int32_t code = 0, native = 0;
  uint32_t tagged = 0, reserved = 0;
};
static_assert(sizeof(Header) == 40 && std::is_trivially_copyable_v<Header>);

}  // namespace pdxfer::transport::shm
