// HostCopier: a PagedCopy carried out between host memory mapped in this process, with a budget and any number of
// threads. The engine hands its copy() to transports (transport::HostCopy).
//
// Owns its helper threads (pdx-copy-1, ...), joined by the destructor. copy() may be called from several threads at
// once: one of them gets the helpers, the others copy alone. Helpers take part in steps of 4 MiB and more. It neither
// allocates nor throws, and locks once per slice of 512 KiB or more.
#pragma once

#include <array>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include "core/copy_choice.hpp"
#include "core/types.hpp"

namespace pdxfer::pack {

// By the mean size of a copy's extents: what is fastest for one is not for the others.
struct CopyChoices {
  CopyChoice below_2k, below_32k, longer;
};

class HostCopier {
 public:
  // Uses the calling thread and `threads - 1` of its own (0 counts as 1, at most 64).
  // Throws Error(kUnavailable) when a thread cannot be started.
  explicit HostCopier(unsigned threads = 1);
  HostCopier(const HostCopier&) = delete;
  HostCopier& operator=(const HostCopier&) = delete;

  // Copies at most `budget` bytes from the cursor on and moves the cursor past them; returns how many. src[i] and
  // dst[i] are where the regions of pair i begin in this process. Requires a sealed copy whose ranges were checked.
  // The bytes are globally visible when it returns.
  uint64_t copy(const PagedCopy& copy, Cursor& cursor, uint64_t budget, std::span<std::byte* const> src,
                std::span<std::byte* const> dst) noexcept;

  unsigned threads() const noexcept { return static_cast<unsigned>(helpers_.size()) + 1; }

 private:
  static constexpr size_t kMaxSlices = 128;

  struct Slice {
    Cursor cursor;
    uint64_t bytes = 0;
  };
  // The copy in progress, cut into slices that helpers and caller take in turn.
  struct Job {
    const PagedCopy* copy = nullptr;
    std::span<std::byte* const> src, dst;
    std::array<Slice, kMaxSlices> slices;
    size_t count = 0, next = 0, done = 0;
  };

  void cut(const PagedCopy& copy, Cursor& cursor, uint64_t bytes) noexcept;
  bool take_slice(std::unique_lock<std::mutex>& lock) noexcept;
  void help(const std::stop_token& stop) noexcept;

  CopyChoices choices_;
  std::mutex in_use_;  // held by the caller that has the helpers
  std::mutex mutex_;   // guards job_ while helpers may look at it
  std::condition_variable_any work_, finished_;
  Job job_;
  std::vector<std::jthread> helpers_;  // last: stopped and joined before what they use goes
};

}  // namespace pdxfer::pack
