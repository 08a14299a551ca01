// From a Pairing and page numbers (or from raw address lists) to a sealed PagedCopy: what a transport takes.
//
// Called once per transfer and component, on the caller's thread and without the GIL. Pure; throws Error(kInvalid).
#pragma once

#include <cstdint>
#include <span>

#include "core/types.hpp"
#include "plan/layout.hpp"
#include "plan/runs.hpp"

namespace pdxfer::plan {

// Page src_pages[i] of every source buffer goes to page dst_pages[i] of its partner. No pages: an empty copy.
PagedCopy make_copy(const Pairing& pairing, std::span<const int32_t> src_pages, std::span<const int32_t> dst_pages,
                    RunOptions options = {});
PagedCopy make_copy(const Pairing& pairing, std::span<const int64_t> src_pages, std::span<const int64_t> dst_pages,
                    RunOptions options = {});

// The columns of an address list, equally long: lengths[i] bytes from src_offsets[i] of region src_ids[i].
struct Extents {
  std::span<const uint32_t> src_ids;
  std::span<const uint64_t> src_offsets;
  std::span<const uint32_t> dst_ids;
  std::span<const uint64_t> dst_offsets;
  std::span<const uint64_t> lengths;
};

// One pair per extent and the single run {0, 0, 1}. Neighbours that continue on both sides become one; extents of no
// bytes are dropped. Whether destinations overlap is not checked: raw lists are the caller's word.
PagedCopy extents_copy(const Extents& extents);

}  // namespace pdxfer::plan
