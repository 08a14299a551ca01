// Engine: the facade that callers and the Python module use. Owns the regions, the transports, the acceptor and the
// worker. Every member may be called from any thread; only connect, deregister_memory, disconnect and close wait, each
// with a bound.
#pragma once

#include <unistd.h>

#include <memory>
#include <optional>
#include <shared_mutex>
#include <string>
#include <vector>

#include "core/config.hpp"
#include "engine/acceptor.hpp"
#include "engine/peer_state.hpp"
#include "engine/region_table.hpp"
#include "engine/worker.hpp"
#include "pack/paged_copy_host.hpp"

namespace pdxfer::engine {

class Engine {
 public:
  // Listens and starts its threads. Throws Error: kInvalid for the configuration, kUnavailable for the port.
  explicit Engine(Config config);
  ~Engine();
  Engine(const Engine&) = delete;

  const Config& config() const noexcept { return config_; }
  // "host:port" for peers to connect to; "[::1]:port" for IPv6.
  const std::string& address() const noexcept { return address_; }
  const Identity& identity() const noexcept { return identity_; }

  // The memory stays the caller's and must live until deregister_memory. Throws Error: kInvalid when it is empty or
  // overlaps a region, kUnavailable when no transport can take it.
  Region register_memory(const Buffer& buffer);
  // Returns when no peer, batch or transport touches the region any more. Peers that do not let go within
  // Config::peer_timeout_ms are dropped. Throws Error(kInvalid) for an unknown region.
  void deregister_memory(RegionId region);

  // Handshake with the engine at "host:port". Throws Error: kTimeout, kUnavailable (nobody there, other version, wrong
  // secret, no common transport), kInvalid (address).
  PeerId connect(const std::string& address, std::chrono::milliseconds timeout);
  // Orderly close; outstanding batches fail with kPeerLost. Throws Error(kInvalid) for an unknown peer.
  void disconnect(PeerId peer);

  // Queues the plan and returns at once. Throws Error: kInvalid when a slot leaves its region, kPeerLost, kUnavailable
  // when Config::max_batches are in flight (poll, then try again).
  std::shared_ptr<Batch> submit(PeerId peer, std::shared_ptr<const TransferPlan> plan, std::optional<uint64_t> tag,
                                Bytes tail);
  void cancel(const std::shared_ptr<Batch>& batch) { worker_.cancel(batch); }
  std::vector<Completion> poll(size_t max) { return worker_.take_arrivals(max); }

  const RegionTable& regions() const noexcept { return regions_; }
  // Throws Error(kInvalid) for an unknown peer. Lost peers are kept, up to a number, so that their end can be read.
  std::shared_ptr<PeerState> peer(PeerId id) const;
  std::vector<std::shared_ptr<PeerState>> peers() const;
  // Names of the transports of this engine in order of preference, with why each is not usable ("" when it is).
  std::vector<std::pair<std::string, std::string>> transports() const;
  size_t in_flight() const noexcept { return worker_.in_flight(); }

  // Closes every peer and stops the threads. Idempotent; everything throws Error(kUnavailable) afterwards.
  void close();
  // False in a forked child: it has a copy of the engine and none of its threads, which close() and the destructor
  // would wait for.
  bool in_own_process() const noexcept;

 private:
  struct Slot {  // one transport
    std::unique_ptr<transport::Transport> transport;
    std::string refusal;
  };
  static constexpr size_t kMaxLostPeers = 256;

  void make_transports();
  void welcome(FrameLink link, Deadline deadline);
  PeerId handshake(FrameLink link, transport::Role role, Deadline deadline);
  std::vector<RegionNotice> notices(const transport::Transport& transport) const;
  void require_open() const;
  // Throws Error(kUnavailable) when the engine is closed or another process's; while it is held, close() waits.
  std::shared_lock<std::shared_mutex> operation();
  void await(const std::future<void>& answer) const;

  const pid_t process_ = ::getpid();
  const Config config_;
  Identity identity_;
  std::string address_;
  pack::HostCopier copier_;
  RegionTable regions_;
  mutable std::mutex mutex_;  // guards what follows
  std::map<RegionId, std::map<const transport::Transport*, Bytes>> keys_;
  std::map<PeerId, std::shared_ptr<PeerState>> peers_;
  RegionId next_region_ = 1;
  PeerId next_peer_ = 1;
  std::atomic<BatchId> next_batch_{1};
  const bool spins_ = std::thread::hardware_concurrency() > 2;  // a waiting caller takes no core that others need
  std::atomic<bool> closed_{false};
  // Shared by every call that uses transports or the worker, exclusive for close(): it waits for them, each bounded.
  std::shared_mutex operations_;

  Worker worker_;  // before the transports: they wake it until they are gone
  std::vector<Slot> transports_;
  std::optional<Acceptor> acceptor_;  // last to start, first to stop
};

}  // namespace pdxfer::engine
