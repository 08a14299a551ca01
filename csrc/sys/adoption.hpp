// Exchanging private anonymous pages for a memfd's, in place. Used by shared_memory.cpp under its lock.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/status.hpp"
#include "sys/userfault.hpp"

namespace pdxfer::sys {

// Make [address, address + bytes) (page aligned, private anonymous memory of one protection `prot`) the memfd's bytes
// from `offset` on, contents kept, chunk by chunk. With `freeze` no concurrent write is lost; without, the caller
// vouches that there is none. On failure a leading part may be shared already; contents are right everywhere.
// Allocates nothing and writes no memory but its own stack: it may be exchanging the pages malloc lives on.
Status adopt_pages(std::byte* address, uint64_t bytes, int prot, int memfd, uint64_t offset,
                   WriteFreeze* freeze) noexcept;

}  // namespace pdxfer::sys
