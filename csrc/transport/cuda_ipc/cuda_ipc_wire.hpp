// What cuda_ipc puts on the wire: a region's key, and the messages of a link's socket. Everything is
// checked on the way in, since a peer may be another version. Any thread; owns nothing.
#pragma once

#include <array>
#include <string>

#include "core/codec.hpp"
#include "core/types.hpp"
#include "shim/cuda.hpp"
#include "transport/local/local_socket.hpp"
#include "transport/local/outbox.hpp"

namespace pdxfer::transport::cuda_ipc {

inline constexpr uint32_t kVersion = 4;
inline constexpr local::Protocol kProtocol{"cuda_ipc", 0x44584450, kVersion};  // "PDXD"

using ProcessId = std::array<uint64_t, 2>;  // random, one per process: in one process no handle is needed
ProcessId this_process();

// The two ends of a new link tell each other this first.
struct Hello {
  int32_t device = kHost;  // which this end's memory is on, in its own numbering; kHost: none registered so far
  Bytes encode() const;
  static Hello decode(ByteView body);  // throws Error(kUnavailable)
};

// How a region can be opened in another process.
struct Key {
  enum class Kind : uint8_t { kHandle, kPieces, kNone };
  Kind kind = Kind::kNone;
  ProcessId process{};
  int32_t device = 0;            // the owner's ordinal
  uint64_t offset = 0;           // of the region in its allocation, or in its first piece
  uint64_t allocation = 0;       // bytes of the allocation
  shim::CuIpcHandle handle{};    // kHandle
  std::vector<uint64_t> pieces;  // kPieces: bytes of each, whose descriptors are asked for over the socket
  std::string refusal;           // kNone: why (also of host memory, which is never mapped)

  Bytes encode() const;
  static Key decode(ByteView bytes);  // throws Error(kInvalid)
};

enum class Type : uint32_t {
  kHello = 1,  // set-up, in this order
  kStaging,  // slots of the ring, whose memory comes with it, that of the progress word, and from the connecting end a
             // stream socket
  kBegin,    // a batch's bytes are under way: its end will follow soon
  kWant,     // region, from piece `batch` on: send me its descriptors
  kPieces,   // region, from piece `batch` on: they come with this message; code not ok: they cannot be had
  kRevoke,   // region: its owner wants it back; answer kRevoked when nothing of yours can write to it any more
  kRevoked,
  kEnd,  // batch, tagged, tag, tail: every byte of the batch is in place; with a piece: it is once the progress word of
         // the sender (cuda_ipc_progress.hpp) has come so far
  kInPlace,  // batch, whose end came before: it is, for a receiver that no longer looks at that word
  kAck,      // batch, code
  // Batches with checksums (cuda_ipc_verifier.hpp) say before their end, in this order:
  kPlan,    // batch, region: which copy, tag: pairs, and runs in the upper half: the next part of its destination
  kLanded,  // batch, region: which copy, tag: so many more of its bytes, in canonical order, are in place
  kSum,     // batch, tag: the checksum of all of it; every byte is in place
  kGiveUp,  // batch: its sender gave it up, and no end will come; one that came and still waits is answered kCancelled
};

using Header = local::Header<Type>;

}  // namespace pdxfer::transport::cuda_ipc
