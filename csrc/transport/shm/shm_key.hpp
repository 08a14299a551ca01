// What shm puts on the wire at set-up: a region's key, and the messages of a link's socket.
// Everything is checked on the way in, since a peer may be another version. Any thread; owns nothing.
#pragma once

#include <string>

#include "core/codec.hpp"
#include "core/types.hpp"
#include "transport/local/local_socket.hpp"
#include "transport/local/outbox.hpp"

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

using Header = local::Header<Type>;

}  // namespace pdxfer::transport::shm
