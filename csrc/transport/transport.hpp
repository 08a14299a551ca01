// The seam: what every way of moving bytes between two processes looks like to the engine.
//
// A Transport is one engine's end of one technology (shm, tcp, ...); a transport::Peer is that technology's link to
// one other engine. The engine owns both, negotiates over its own control connection, and is the only caller.
//
// Threads. Set-up calls (address, register_memory, deregister_memory, connect, destruction) come from any thread, one
// at a time per object or guarded inside. submit, notify, cancel and poll come from one thread at a time: the engine's
// worker, or, for a transport that launches(), a caller of Engine::submit in the worker's place while that sleeps.
// A transport may run threads of its own; it hands results back through poll().
//
// Clauses, each tested on every transport by tests/cpp/conformance*.hpp:
//  1. submit never blocks; it advances the cursor as far as it can; no progress means "poll, then try again".
//     One call moves at most Limits::chunk_bytes or so, so that batches share a link fairly.
//  2. Extents of a batch may land in any order; nothing is promised before arrival.
//  3. notify is ordered after every byte of its batch, and its tail of host bytes arrives with it.
//  4. One kSent at the sender and, when ok and tagged, one kArrived at the receiver; an error replaces, never
//     duplicates. kSent ok is given only after the receiving end acknowledged that the bytes are visible there.
//  5. kSent ok: the source may be reused. kArrived: the bytes are visible to whoever reads after poll returned.
//  6. A lost peer completes each of its batches with kPeerLost; other peers do not notice. lost() says why.
//  7. A bad id, index or range completes kInvalid and touches no memory, on either end.
//  8. After the kSent that follows cancel (or a failure), no late write of that batch can land any more.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "core/config.hpp"
#include "core/device_copy.hpp"
#include "core/paged_copy.hpp"
#include "core/rdma_options.hpp"
#include "core/types.hpp"

namespace pdxfer::transport {

using Clock = std::chrono::steady_clock;
using Deadline = Clock::time_point;

enum class Role : uint8_t { kConnect, kAccept };  // who called Engine::connect; both ends call Transport::connect

// Everything one end needs to make its Peer. The engine fills it from the authenticated handshake.
struct Link {
  PeerId peer = kNoId;  // our number for the other engine
  Role role = Role::kConnect;
  Bytes address;           // the other end's Transport::address()
  std::string host_hint;   // the host under which the control connection reached it, for wildcard addresses
  uint8_t token[16] = {};  // random, the same at both ends, fresh per handshake: names and guards sockets of this link
  Deadline deadline{};     // connect returns or throws by then
};

class Peer {
 public:
  virtual ~Peer() = default;  // closes; outstanding batches are dropped without completions (the engine has fenced)

  // Learn of, or forget, a region of the other end. `key` is what its register_memory returned there.
  // Forget is called when no batch of ours uses the region any more. Throws Error. Any thread, not with submit.
  virtual void import_region(const Region& region, ByteView key) = 0;
  virtual void forget_region(RegionId region) = 0;

  // Move the next piece of one copy of a batch. `copy_index` counts the copies of the batch's plan; `plan` stays alive
  // and unchanged until the batch's kSent was polled. The plan was checked against both ends' regions by the engine.
  // An error means that nothing of this piece was taken and that the batch is over: its one kSent, with that status,
  // follows as after cancel. cancel() on such a batch, or on one whose kSent waits to be polled, does nothing; on one
  // that was never submitted it completes at once.
  virtual Status submit(BatchId batch, const TransferPlan& plan, uint32_t copy_index, Cursor& cursor) = 0;
  // End the batch. With a tag the receiver's poll yields kArrived(tag, tail); without, it only acknowledges.
  // Returns false when it cannot take it now (poll, then try again).
  virtual bool notify(BatchId batch, std::optional<uint64_t> tag, ByteView tail) = 0;
  // Give up a batch that has not completed; its kSent(kCancelled) follows once nothing more of it can land.
  virtual void cancel(BatchId batch) = 0;

  // Not ok once the link is dead. Worker thread.
  virtual Status lost() const = 0;
  // One line for explain(): "mapped: 56 regions, 1.2 GiB", "4 streams to 10.0.0.2:4711".
  virtual std::string describe() const = 0;
};

struct Limits {
  uint64_t chunk_bytes = 1 << 20;
  uint64_t staging_bytes = 64 << 20;
  uint64_t device_chunk_bytes = 512 << 20;  // chunk_bytes for one launch of a device copy
  uint32_t copy_threads = 1;
  uint32_t io_threads = 1;
  uint32_t tcp_streams = 4;
  uint64_t max_tail_bytes = 1 << 16;
  uint32_t peer_timeout_ms = 3000;  // silence of a connection with unacknowledged bytes after which its peer is lost
};

class Transport {
 public:
  virtual ~Transport() = default;

  virtual const char* name() const = 0;
  // What a peer needs to reach us, at most 4 KiB; carried opaquely in the handshake.
  virtual Bytes address() = 0;
  // Make `region` reachable; the key (at most 64 KiB) goes to peers' import_region. The memory belongs to the caller
  // until deregister_memory returned, after which nothing of ours reads or writes it. Throws Error.
  virtual Bytes register_memory(const Region& region) = 0;
  virtual void deregister_memory(RegionId region) = 0;
  // Make the link; both ends call it at the same time with opposite roles. Throws Error(kUnavailable) with the reason
  // when this technology cannot reach that peer (other host, no permission); the engine then tries the next.
  virtual std::unique_ptr<Peer> connect(const Link& link) = 0;
  // Up to out.size() completions of all peers; runs what the transport must do on the worker. Never blocks.
  virtual size_t poll(std::span<Completion> out) = 0;
  // Is something under way, and due within microseconds, that only poll notices? The worker then calls it again at once
  // in place of sleeping. Worker thread.
  virtual bool spinning() const { return false; }
  // Does submit only launch what something else then moves, most of it within a millisecond? Then waking a thread would
  // cost as much as the transfer: callers launch it themselves, and spin a little when they wait for it. Any thread.
  virtual bool launches() const { return false; }
};

// pack's host copy, handed in by the engine because transport may not include pack. Copies at most `budget` bytes of
// `copy` from the cursor on and moves the cursor; src[i] and dst[i] are where the regions of pair i begin in this
// process. Returns the bytes copied. May use threads of its own; returns when the bytes are globally visible.
using HostCopy = std::function<uint64_t(const PagedCopy& copy, Cursor& cursor, uint64_t budget,
                                        std::span<std::byte* const> src, std::span<std::byte* const> dst)>;

// Makes host memory reachable by the GPUs of this process, at the same address, while the result lives; `ordinal` is
// one of them. Throws Error(kUnavailable) with the reason.
using HostPin = std::function<std::shared_ptr<void>(int ordinal, std::byte* data, uint64_t bytes)>;

// What the engine gives a transport at creation.
struct Context {
  Limits limits;
  HostCopy copy;
  DeviceCopyFactory device_copy;  // empty: no device memory here
  HostPin pin;                    // likewise
  std::string host;               // Config::host
  std::string cuda;               // Config::cuda
  std::string shm_path;           // Config::shm_path
  RdmaOptions rdma;               // Config::rdma
  // Wake the engine's worker from any thread: there is something to poll.
  std::function<void()> wake;
};

}  // namespace pdxfer::transport
