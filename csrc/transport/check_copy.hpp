// Checks that every transport makes before it walks a copy, so that no plan, however wrong, leads a walk outside the
// regions that check_range vouched for. Header-only; worker and io threads.
#pragma once

#include <algorithm>

#include "core/paged_copy.hpp"

namespace pdxfer::transport {

// Are the fields that seal() derives true, and is every run worth walking? O(runs): once per copy of a batch.
inline Status check_sealed(const PagedCopy& copy) noexcept {
  uint64_t slots = 0, src_end = 0, dst_end = 0, per_slot = 0, bytes = 0;
  for (const Run& r : copy.runs) {
    if (r.count == 0) return {Code::kInvalid, 0, "empty run"};
    slots += r.count;
    src_end = std::max(src_end, uint64_t{r.src_slot} + r.count);
    dst_end = std::max(dst_end, uint64_t{r.dst_slot} + r.count);
  }
  for (const RegionPair& p : copy.pairs)
    if (__builtin_add_overflow(per_slot, p.slot_bytes, &per_slot)) return {Code::kInvalid, 0, "copy too large"};
  if (__builtin_mul_overflow(slots, per_slot, &bytes)) return {Code::kInvalid, 0, "copy too large"};
  if (slots != copy.slots || bytes != copy.bytes || src_end != copy.src_slot_end || dst_end != copy.dst_slot_end)
    return {Code::kInvalid, 0, "copy was changed after seal()"};
  return kOkStatus;
}

// Does the cursor stand on a byte of the copy? (Its end does not.)
inline bool inside(const PagedCopy& copy, const Cursor& cursor) noexcept {
  return cursor.pair < copy.pairs.size() && cursor.run < copy.runs.size() &&
         cursor.slot < copy.runs[cursor.run].count && cursor.byte < copy.pairs[cursor.pair].slot_bytes;
}

}  // namespace pdxfer::transport
