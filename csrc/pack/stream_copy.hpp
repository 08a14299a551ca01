// Copying one contiguous piece of host memory past the caches, with the widest instructions this processor has.
//
// For copies much larger than a cache: a plain store first reads the line it overwrites and then evicts lines that
// somebody needs. Called by HostCopier, on any thread; owns nothing.
#pragma once

#include <cstddef>

namespace pdxfer::pack {

// Copies `bytes` (any number, any alignment, no overlap) from `src` to `dst`.
using CopyFn = void (*)(std::byte* dst, const std::byte* src, size_t bytes) noexcept;

// The best streaming copy here, or plain_copy where there is none.
CopyFn streaming_copy() noexcept;
void plain_copy(std::byte* dst, const std::byte* src, size_t bytes) noexcept;

// Streaming stores of this thread are globally visible once it returns.
void streaming_fence() noexcept;

}  // namespace pdxfer::pack
