// Copying one contiguous piece of host memory past the caches, with the widest instructions this processor has.
//
// For copies much larger than a cache: a plain store first reads the line it overwrites and then evicts lines that
// somebody needs. Called by HostCopier, on any thread; owns nothing.
#pragma once

#include <cstddef>

namespace pdxfer::pack {

// The source of a later piece, to be on its way into the level-2 cache by the time it is copied.
struct Ahead {
  const std::byte* src = nullptr;
  size_t bytes = 0;
};

// Copies `bytes` (any number, any alignment, no overlap) from `src` to `dst`, and prefetches `ahead` meanwhile, line
// for line: loads that wait for memory and prefetches then share the core's few slots for misses evenly.
using CopyFn = void (*)(std::byte* dst, const std::byte* src, size_t bytes, Ahead ahead) noexcept;

// The best streaming copy here, or plain_copy where there is none.
CopyFn streaming_copy() noexcept;
void plain_copy(std::byte* dst, const std::byte* src, size_t bytes, Ahead ahead) noexcept;
void prefetch(Ahead ahead) noexcept;

// Streaming stores of this thread are globally visible once it returns.
void streaming_fence() noexcept;

}  // namespace pdxfer::pack
