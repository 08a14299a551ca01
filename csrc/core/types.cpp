// Derived fields of the factorised copy; see types.hpp.
#include "core/types.hpp"

#include <algorithm>

namespace pdxfer {

void PagedCopy::seal() noexcept {
  slots = src_slot_end = dst_slot_end = 0;
  bool sound = true;
  for (const Run& r : runs) {
    sound &= r.count != 0;
    slots += r.count;
    src_slot_end = std::max(src_slot_end, uint64_t{r.src_slot} + r.count);
    dst_slot_end = std::max(dst_slot_end, uint64_t{r.dst_slot} + r.count);
  }
  uint64_t per_slot = 0;
  for (const RegionPair& p : pairs) sound &= !__builtin_add_overflow(per_slot, p.slot_bytes, &per_slot);
  sound &= !__builtin_mul_overflow(slots, per_slot, &bytes);
  // Runs may come from the wire. An empty run or a total past 64 bits can never be walked, so no region may fit it.
  if (!sound) src_slot_end = dst_slot_end = bytes = UINT64_MAX;
}

uint64_t TransferPlan::bytes() const noexcept {
  uint64_t total = 0;
  for (const PagedCopy& copy : copies) total += copy.bytes;
  return total;
}

}  // namespace pdxfer
