// Copying a list of contiguous pieces of host memory past the caches, with the widest instructions this processor has.
//
// For copies much larger than a cache: a plain store first reads the line it overwrites and then evicts lines that
// somebody needs. Called by HostCopier, on any thread; owns nothing.
#pragma once

#include <cstddef>

#include "core/prefetch.hpp"

namespace pdxfer::pack {

struct Piece {
  std::byte* dst = nullptr;
  const std::byte* src = nullptr;
  size_t bytes = 0;
};

// Copies `count` pieces (any sizes and alignments, no overlap) in order, and on the way prefetches the source of as
// many from `ahead` on, a line of them for every line copied, which is what keeps the memory busy all the time.
using CopyFn = void (*)(const Piece* pieces, const Piece* ahead, size_t count) noexcept;

// The best streaming copy here, or plain_copy where there is none, with what is ahead prefetched to that level.
CopyFn streaming_copy(CacheLevel level) noexcept;
CopyFn plain_copy(CacheLevel level) noexcept;

// Streaming stores of this thread are globally visible once it returns.
void streaming_fence() noexcept;

}  // namespace pdxfer::pack
