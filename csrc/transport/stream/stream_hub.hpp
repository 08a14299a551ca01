// StreamHub: everything of a stream-based transport but the making of channels: registered memory, io threads, peers
// and completions. tcp owns one over sockets, shm's staging mode one over rings in shared memory.
//
// Threads as the seam says: poll from the worker, the rest from any thread. Io threads start with the first peer.
#pragma once

#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "transport/stream/channel.hpp"
#include "transport/stream/device_lane.hpp"
#include "transport/stream/io_loop.hpp"
#include "transport/stream/region_table.hpp"
#include "transport/stream/slot_ring.hpp"
#include "transport/transport.hpp"

namespace pdxfer::transport::stream {

class StreamPeer;

class StreamHub {
 public:
  // A GPU is made ready by the first piece that needs it, in each io thread. Is it tried, and given back, with the
  // first region of its memory, so that what stands in the way is said there? Not by a transport that has other ways.
  enum class TryDevices : uint8_t { kAtRegistration, kNever };

  // `transport` names the caller in errors and in describe(); a literal. Uses context.limits, wake, device_copy and
  // pin.
  StreamHub(const Context& context, const char* transport, TryDevices tried = TryDevices::kAtRegistration);
  ~StreamHub();  // its peers are gone before
  StreamHub(const StreamHub&) = delete;
  StreamHub& operator=(const StreamHub&) = delete;

  // The bodies of Transport's functions of the same names. Keys are empty: the wire names regions by id.
  Bytes register_memory(const Region& region);
  void deregister_memory(RegionId region);
  size_t poll(std::span<Completion> out);

  // A peer over 1 to 64 connected channels, the same in the same order at both ends. With a ring, over one channel of a
  // peer on this machine, device memory passes through its slots. Throws Error.
  std::unique_ptr<Peer> make_peer(PeerId peer, std::vector<std::unique_ptr<Channel>> channels, std::string description,
                                  std::unique_ptr<SlotRing> ring = nullptr);

 private:
  friend class StreamPeer;
  struct Driver {  // an io thread; the lane outlives what the thread does with it
    std::unique_ptr<DeviceLane> lane;
    std::unique_ptr<IoLoop> loop;
  };

  void forget(StreamPeer* peer);
  void try_device(int ordinal);
  void add_driver();

  const Context context_;
  const Limits limits_;
  const std::function<void()> wake_;
  const char* const transport_;
  const TryDevices tried_;
  RegionTable regions_;
  std::mutex mutex_;  // guards what follows; io threads never take it
  std::vector<Driver> drivers_;
  std::vector<int> devices_;  // that were tried
  std::vector<StreamPeer*> peers_;
  size_t next_peer_ = 0;  // who is polled first
};

}  // namespace pdxfer::transport::stream
