// Port: one opened RDMA port and what all links of a transport share on it: protection domain, completion queue with
// its event channel, and the shared receive queue with the buffers of small messages. Made at set-up; afterwards used
// under the transport's mutex, except take_events() and the flags it sets, which belong to the event thread.
#pragma once

#include <atomic>
#include <memory>
#include <utility>
#include <vector>

#include "shim/verbs.hpp"
#include "transport/rdma/rdma_nic.hpp"

namespace pdxfer::transport::rdma {

inline constexpr uint32_t kMessageBytes = 4096;    // one receive buffer; a message with its header fits
inline constexpr uint32_t kReceivesPerLink = 128;  // on every port: the window of messages and as many credits again
inline constexpr uint32_t kSendDepth = 128;        // work requests outstanding per queue pair
inline constexpr uint64_t kReceiveId = uint64_t{1} << 63;

class Rail;

// A memory registration, released with its owner.
class MemoryKey {
 public:
  MemoryKey(const shim::VerbsApi& api, shim::IbvMr* mr) noexcept : api_(&api), mr_(mr) {}
  MemoryKey(MemoryKey&& other) noexcept : api_(other.api_), mr_(std::exchange(other.mr_, nullptr)) {}
  MemoryKey& operator=(MemoryKey&& other) noexcept {
    std::swap(api_, other.api_);
    std::swap(mr_, other.mr_);
    return *this;
  }
  ~MemoryKey();
  uint32_t local() const noexcept { return mr_->lkey; }
  uint32_t remote() const noexcept { return mr_->rkey; }

 private:
  const shim::VerbsApi* api_;
  shim::IbvMr* mr_;
};

class Port {
 public:
  // Throws Error(kUnavailable) naming the device and the call that failed.
  Port(const shim::VerbsApi& api, const Nic& nic);
  ~Port();
  Port(const Port&) = delete;
  Port& operator=(const Port&) = delete;

  // Host memory. Throws Error(kUnavailable).
  MemoryKey register_host(void* data, size_t bytes, bool remote_write) const;
  // Device memory through the fd of its dma-buf, at `offset` into it. Throws Error(kUnavailable).
  MemoryKey register_dmabuf(int fd, uint64_t offset, uint64_t address, size_t bytes) const;

  void add_link();  // receive buffers for one link more; throws Error(kUnavailable)
  void drop_link() noexcept { ++spare_; }
  void repost(uint32_t buffer) noexcept;
  const std::byte* received(uint32_t buffer) const noexcept;
  int poll(std::span<shim::IbvWc> out) noexcept { return cq->context->ops.poll_cq(cq, int(out.size()), out.data()); }
  // Ask for an event with the next completion. True when it was not asked for before: poll once more then.
  bool arm() noexcept;
  // Event thread: empties the channels behind the two descriptors. True when the worker has something to look at.
  bool take_events() noexcept;
  int completion_fd() const noexcept { return channel->fd; }
  int async_fd() const noexcept { return context->async_fd; }

  const shim::VerbsApi& api;
  const Nic nic;
  uint32_t max_sge = 1, max_message = 1u << 30;
  shim::IbvContext* context = nullptr;
  shim::IbvPd* pd = nullptr;
  shim::IbvCompChannel* channel = nullptr;
  shim::IbvCq* cq = nullptr;
  shim::IbvSrq* srq = nullptr;
  std::atomic<bool> dead{false};  // the port reported an error, or the device did
  std::vector<Rail*> rails;       // live queue pairs, found by number

  Rail* find(uint32_t qp_num) const noexcept;

 private:
  struct Block {
    std::unique_ptr<std::byte[]> memory;
    MemoryKey key;
  };
  void release() noexcept;
  std::vector<Block> blocks_;
  uint32_t spare_ = 0;
  std::atomic<bool> armed_{false};
};

}  // namespace pdxfer::transport::rdma
