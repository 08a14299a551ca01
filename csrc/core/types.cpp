// Derived fields of the factorised copy; see types.hpp.
#include "core/types.hpp"

#include <algorithm>

namespace pdxfer {

void PagedCopy::seal() noexcept {
  slots = src_slot_end = dst_slot_end = 0;
  for (const Run& r : runs) {
    slots += r.count;
    src_slot_end = std::max(src_slot_end, uint64_t{r.src_slot} + r.count);
    dst_slot_end = std::max(dst_slot_end, uint64_t{r.dst_slot} + r.count);
  }
  uint64_t per_slot = 0;
  for (const RegionPair& p : pairs) per_slot += p.slot_bytes;
  bytes = slots * per_slot;
}

uint64_t TransferPlan::bytes() const noexcept {
  uint64_t total = 0;
  for (const PagedCopy& copy : copies) total += copy.bytes;
  return total;
}

}  // namespace pdxfer
