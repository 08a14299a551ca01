// Hub: what all links of one rdma transport share: the ports, the registered memory, the mutex that guards everything
// of the transport, and the thread that waits for the devices' events and wakes the engine's worker.
//
// The mutex is taken once per call of the seam, never per extent, and only set-up contends for it.
#pragma once

#include <list>
#include <mutex>
#include <thread>
#include <unordered_map>

#include "sys/poller.hpp"
#include "transport/rdma/rdma_port.hpp"
#include "transport/transport.hpp"

namespace pdxfer::transport::rdma {

class RdmaLink;

struct LocalRegion {
  Buffer buffer;
  std::vector<MemoryKey> keys;  // by port
  std::string how;              // "host memory", "dma-buf", "nvidia-peermem (why not dma-buf)"
};

class Hub {
 public:
  Hub(Context context, const shim::VerbsApi& api, std::span<const Nic> nics);  // throws Error(kUnavailable)
  ~Hub();

  void watch(int fd);  // a side connection
  void unwatch(int fd) noexcept { poller_.remove(fd); }
  size_t poll(std::span<Completion> out);
  const LocalRegion* find(RegionId region) const noexcept {
    const auto found = regions.find(region);
    return found == regions.end() ? nullptr : &found->second;
  }
  void wake() const {
    if (context.wake) context.wake();
  }

  const Context context;
  const shim::VerbsApi& api;
  mutable std::mutex mutex;
  std::vector<std::unique_ptr<Port>> ports;
  std::unordered_map<RegionId, LocalRegion> regions;
  uint64_t epoch = 1;  // changes whenever a region goes, ours or a peer's
  std::vector<RdmaLink*> links;
  // Something moved or was posted just now: poll() leaves the devices' events off for a while, and asks to be called
  // again at once, which saves the microseconds of an interrupt. Under the mutex.
  void touch() noexcept { active_until_ = transport::Clock::now() + spin_; }
  bool spinning() const noexcept { return spinning_.load(std::memory_order_relaxed); }
  // Dispatches what the completion queues hold. Under the mutex.
  bool drain();

 private:
  void wait_for_events();
  void dispatch(Port& port, const shim::IbvWc& wc);
  const std::chrono::microseconds spin_;
  transport::Clock::time_point active_until_{};
  std::atomic<bool> spinning_{false};
  std::atomic<bool> side_ready_{false}, stopping_{false};
  sys::Poller poller_;
  std::thread thread_;
};

// Device memory as a dma-buf: where the buffer begins in it. Throws Error(kUnavailable) with the driver's reason.
struct DmabufRange {
  sys::UniqueFd fd;
  uint64_t offset = 0;
};
DmabufRange export_dmabuf(const Buffer& buffer);

// Registers host or device memory with every port. Throws Error. Slow for large memory: not under the mutex.
LocalRegion register_region(const Hub& hub, const Region& region);

}  // namespace pdxfer::transport::rdma
