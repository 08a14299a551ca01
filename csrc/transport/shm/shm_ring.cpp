// See shm_ring.hpp. The sleep protocol: the side that finds nothing to do announces it, looks once more, and returns;
// the other side, having moved its position, looks for the announcement and rings. Both pairs of steps are sequentially
// consistent, so one of the two sees the other.
#include "transport/shm/shm_ring.hpp"

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>

#include "core/status.hpp"
#include "sys/proc_maps.hpp"

namespace pdxfer::transport::shm {
namespace {

// Positions are published this often within a call, so that the other end works while this one goes on.
constexpr uint64_t kPublish = 128 << 10;

uint64_t head_bytes() noexcept { return sys::page_bytes(); }

void ring_bell(int fd) noexcept {
  // Never drained: with edge-triggered epoll every write is an edge, and the count cannot overflow in practice.
  const uint64_t one = 1;
  [[maybe_unused]] const auto written = ::write(fd, &one, sizeof one);
}

// ThreadSanitizer follows addresses, and both ends of a ring in one process (tests) see it at two: tell it what the
// positions order. A no-op elsewhere.
#if defined(__SANITIZE_THREAD__)
char marks[1 << 16];
void* mark_of(uint64_t inode) noexcept { return &marks[inode * 8 % sizeof marks]; }
void published(uint64_t inode) noexcept { __tsan_release(mark_of(inode)); }
void noticed(uint64_t inode) noexcept { __tsan_acquire(mark_of(inode)); }
#else
void published(uint64_t) noexcept {}
void noticed(uint64_t) noexcept {}
#endif

}  // namespace

RingEnd RingEnd::make(uint64_t bytes) {
  const uint64_t page = sys::page_bytes();
  RingEnd end;
  end.bytes = (bytes + page - 1) / page * page;
  end.memory = sys::make_memfd("pdxfer-ring", head_bytes() + end.bytes);
  end.bell = sys::UniqueFd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!end.bell) throw Error(Code::kUnavailable, "eventfd: " + errno_name(errno), errno);
  return end;
}

RingChannel::Ring RingChannel::open(const RingEnd& end) {
  struct stat info {};
  if (end.bytes == 0 || end.bytes > (1ull << 40) || ::fstat(end.memory.get(), &info) != 0)
    throw Error(Code::kInvalid, "shm: a ring is no memory, or of no size that it should have");
  Ring ring;
  ring.memory = sys::map_memfd(end.memory.get(), head_bytes() + end.bytes, "shm: a ring");
  ring.head = std::launder(reinterpret_cast<RingHead*>(ring.memory.data()));  // zeroed memory is a fresh head
  ring.data = ring.memory.data() + head_bytes();
  ring.bytes = end.bytes;
  ring.inode = info.st_ino;
  return ring;
}

RingChannel::RingChannel(RingEnd mine, RingEnd theirs)
    : mine_(std::move(mine)), theirs_(std::move(theirs)), out_(open(mine_)), in_(open(theirs_)) {
  static_assert(sizeof(RingHead) <= 4096);
}

uint64_t RingChannel::room() const noexcept {
  const uint64_t used =
      out_.head->written.load(std::memory_order_relaxed) - out_.head->read.load(std::memory_order_seq_cst);
  noticed(out_.inode);
  return used > out_.bytes ? UINT64_MAX : out_.bytes - used;
}

uint64_t RingChannel::waiting() const noexcept {
  const uint64_t used =
      in_.head->written.load(std::memory_order_seq_cst) - in_.head->read.load(std::memory_order_relaxed);
  noticed(in_.inode);
  return used > in_.bytes ? UINT64_MAX : used;
}

void RingChannel::wake_reader() noexcept {
  if (out_.head->reader_sleeps.load(std::memory_order_seq_cst) != 0 && out_.head->reader_sleeps.exchange(0) != 0)
    ring_bell(theirs_.bell.get());
}

void RingChannel::wake_writer() noexcept {
  if (in_.head->writer_sleeps.load(std::memory_order_seq_cst) != 0 && in_.head->writer_sleeps.exchange(0) != 0)
    ring_bell(theirs_.bell.get());
}

int64_t RingChannel::writev(std::span<const iovec> iov) noexcept {
  if (closed_ || in_.head->closed.load(std::memory_order_acquire) != 0) return -EPIPE;
  uint64_t free = room();
  if (free == 0) {
    out_.head->writer_sleeps.store(1, std::memory_order_seq_cst);
    free = room();
    if (free == 0) return 0;
  }
  if (free == UINT64_MAX) return -EPROTO;
  uint64_t at = out_.head->written.load(std::memory_order_relaxed), moved = 0, unpublished = 0;
  for (const iovec& part : iov) {
    const auto* from = static_cast<const std::byte*>(part.iov_base);
    for (uint64_t left = std::min<uint64_t>(part.iov_len, free - moved); left > 0;) {
      const uint64_t offset = at % out_.bytes;
      const uint64_t step = std::min({left, out_.bytes - offset, kPublish});
      std::memcpy(out_.data + offset, from, step);
      from += step;
      at += step;
      moved += step;
      left -= step;
      unpublished += step;
      if (unpublished < kPublish) continue;
      published(out_.inode);
      out_.head->written.store(at, std::memory_order_seq_cst);
      wake_reader();
      unpublished = 0;
    }
    if (moved == free) break;
  }
  published(out_.inode);
  out_.head->written.store(at, std::memory_order_seq_cst);
  wake_reader();
  return static_cast<int64_t>(moved);
}

int64_t RingChannel::readv(std::span<const iovec> iov) noexcept {
  if (closed_) return -EPIPE;
  uint64_t ready = waiting();
  if (ready == 0) {
    if (in_.head->closed.load(std::memory_order_acquire) != 0 && waiting() == 0) return -EPIPE;
    in_.head->reader_sleeps.store(1, std::memory_order_seq_cst);
    ready = waiting();
    if (ready == 0) return in_.head->closed.load(std::memory_order_seq_cst) != 0 ? -EPIPE : 0;
  }
  if (ready == UINT64_MAX) return -EPROTO;
  uint64_t at = in_.head->read.load(std::memory_order_relaxed), moved = 0, unpublished = 0;
  for (const iovec& part : iov) {
    auto* to = static_cast<std::byte*>(part.iov_base);
    for (uint64_t left = std::min<uint64_t>(part.iov_len, ready - moved); left > 0;) {
      const uint64_t offset = at % in_.bytes;
      const uint64_t step = std::min({left, in_.bytes - offset, kPublish});
      std::memcpy(to, in_.data + offset, step);
      to += step;
      at += step;
      moved += step;
      left -= step;
      unpublished += step;
      if (unpublished < kPublish) continue;
      published(in_.inode);
      in_.head->read.store(at, std::memory_order_seq_cst);
      wake_writer();
      unpublished = 0;
    }
    if (moved == ready) break;
  }
  published(in_.inode);
  in_.head->read.store(at, std::memory_order_seq_cst);
  wake_writer();
  return static_cast<int64_t>(moved);
}

void RingChannel::shutdown() noexcept {
  closed_ = true;
  out_.head->closed.store(1, std::memory_order_seq_cst);
  ring_bell(theirs_.bell.get());
  ring_bell(mine_.bell.get());
}

}  // namespace pdxfer::transport::shm
