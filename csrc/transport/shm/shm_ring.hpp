// RingChannel: a stream::Channel over two rings of shared memory, one per direction, made by the end that writes it.
// Used for staging, when neither mapping nor cross-memory attach reaches the other end's memory. Called by one io
// thread; shutdown by any.
//
// A ring trusts the other end for its contents only: positions are checked, so that a peer gone wrong is a dead channel
// and never a wild pointer.
#pragma once

#include <atomic>
#include <cstdint>

#include "sys/fd.hpp"
#include "sys/mapping.hpp"
#include "transport/stream/channel.hpp"

namespace pdxfer::transport::shm {

// The first page of a ring's memory; the bytes follow it. Positions only grow.
struct RingHead {
  alignas(64) std::atomic<uint64_t> written{0};
  alignas(64) std::atomic<uint64_t> read{0};
  alignas(64) std::atomic<uint32_t> reader_sleeps{0}, writer_sleeps{0}, closed{0};
};
static_assert(std::atomic<uint64_t>::is_always_lock_free && std::atomic<uint32_t>::is_always_lock_free);

// What an end gives the other: the ring that it writes, and the bell that wakes it (an eventfd).
struct RingEnd {
  sys::UniqueFd memory, bell;
  uint64_t bytes = 0;  // of payload

  static RingEnd make(uint64_t bytes);  // throws Error(kUnavailable)
};

class RingChannel final : public stream::Channel {
 public:
  // Throws Error(kInvalid) when `theirs` is not what it says.
  RingChannel(RingEnd mine, RingEnd theirs);

  int64_t writev(std::span<const iovec> iov) noexcept override;
  int64_t readv(std::span<const iovec> iov) noexcept override;
  int wait_fd() const noexcept override { return mine_.bell.get(); }
  void shutdown() noexcept override;

 private:
  struct Ring {
    sys::Mapping memory;
    RingHead* head = nullptr;
    std::byte* data = nullptr;
    uint64_t bytes = 0, inode = 0;
  };
  static Ring open(const RingEnd& end);

  uint64_t room() const noexcept;     // UINT64_MAX: the positions are nonsense
  uint64_t waiting() const noexcept;  // likewise
  void wake_reader() noexcept;
  void wake_writer() noexcept;

  RingEnd mine_, theirs_;
  Ring out_, in_;
  std::atomic<bool> closed_{false};
};

}  // namespace pdxfer::transport::shm
