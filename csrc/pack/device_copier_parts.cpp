// The half of DeviceCopier that takes a piece apart: what of it the copy engine moves, and what one kernel. See
// device_copier.hpp.
#include <algorithm>
#include <bit>

#include "core/paged_copy.hpp"
#include "pack/device_copier.hpp"

namespace pdxfer::pack {
namespace {

// The largest word, as a power of two, of which all of these are multiples.
unsigned alignment_of(uint64_t together) noexcept {
  return together == 0 ? 4 : std::min<unsigned>(4, static_cast<unsigned>(std::countr_zero(together)));
}

bool alike(const RegionPair& a, const RegionPair& b) noexcept {
  return a.slot_bytes == b.slot_bytes && a.src_stride == b.src_stride && a.dst_stride == b.dst_stride;
}

unsigned alignment_of(const DevicePair& bases, const RegionPair& pair, DeviceForm form) noexcept {
  uint64_t together = pair.slot_bytes;
  if (form == DeviceForm::kPaged || form == DeviceForm::kGather) together |= bases.src | pair.src_stride;
  if (form != DeviceForm::kGather) together |= bases.dst | pair.dst_stride;
  return alignment_of(together);
}

}  // namespace

uint64_t DeviceCopier::slots_before(const TableRing::Entry& entry, const Cursor& cursor) const noexcept {
  if (entry.firsts_at == TableRing::kSingle) return cursor.run;
  return reinterpret_cast<const uint32_t*>(host_tables_.data() + entry.firsts_at)[cursor.run] + uint64_t{cursor.slot};
}

// From the cursor on, which is inside.
uint64_t DeviceCopier::bytes_left(const TableRing::Entry& entry, const PagedCopy& copy,
                                  const Cursor& cursor) const noexcept {
  if (at_end(copy, cursor)) return 0;
  uint64_t per_slot = 0;
  for (size_t i = cursor.pair; i < copy.pairs.size(); ++i) per_slot += copy.pairs[i].slot_bytes;
  return per_slot * copy.slots - slots_before(entry, cursor) * copy.pairs[cursor.pair].slot_bytes - cursor.byte;
}

const DevicePair* DeviceCopier::pairs_of(const TableRing::Entry& entry) const noexcept {
  return reinterpret_cast<const DevicePair*>(host_tables_.data() + entry.pairs_at);
}

// May the copy engine have all of it, many runs at a time? Without such a call (CUDA 12.8) it leaves the link idle for
// 2 us between any two.
bool DeviceCopier::in_batches(const TableRing::Entry& entry, const PagedCopy& copy) const noexcept {
  if (entry.form != DeviceForm::kPaged || !engine_ || shim::cuda().api.copy_batch_async == nullptr) return false;
  uint64_t slot_bytes = UINT64_MAX;
  for (const RegionPair& pair : copy.pairs) {
    if (!dense(pair)) return false;
    slot_bytes = std::min(slot_bytes, pair.slot_bytes);
  }
  return std::ranges::all_of(copy.runs, [&](const Run& run) { return run.count * slot_bytes >= kBatchedRun; });
}

// Of a piece that goes in batches: the bytes at its beginning that the kernel moves while the driver takes the others.
uint64_t DeviceCopier::kernel_lead(const PagedCopy& copy, Cursor cursor, uint64_t budget) const noexcept {
  const uint64_t mean = copy.bytes / (copy.pairs.size() * copy.runs.size());
  const uint64_t wanted = budget * kLeadPerCopy / (mean + kLeadPerCopy);
  uint64_t lead = 0;  // whole runs
  while (lead < budget) {
    const uint64_t slots = copy.runs[cursor.run].count - uint64_t{cursor.slot};
    const uint64_t run = slots * copy.pairs[cursor.pair].slot_bytes - cursor.byte;
    if (lead + run / 2 > wanted) break;
    lead += advance(copy, cursor, run);
  }
  return std::min(lead, budget);
}

// The longest part at the cursor that one kernel can move.
DeviceCopier::Part DeviceCopier::next_part(const TableRing::Entry& entry, const PagedCopy& copy, const Cursor& cursor,
                                           uint64_t budget, uint64_t buffer) const noexcept {
  const RegionPair& pair = copy.pairs[cursor.pair];
  const DevicePair* bases = pairs_of(entry);
  const uint64_t done_slots = slots_before(entry, cursor);
  unsigned log2 = alignment_of(bases[cursor.pair], pair, entry.form);
  uint64_t bytes = (copy.slots - done_slots) * pair.slot_bytes - cursor.byte;
  // Pairs of one shape go together, while the words of all of them can be counted.
  const uint64_t per_pair = copy.slots * pair.slot_bytes;
  for (uint32_t next = cursor.pair + 1; next < entry.pairs && bytes < budget; ++next) {
    if (!alike(copy.pairs[next], pair) || alignment_of(bases[next], pair, entry.form) != log2) break;
    bytes += per_pair;
  }
  if (entry.buffered()) log2 = std::min(log2, alignment_of(buffer));
  bytes = std::min(bytes, budget);
  const uint64_t word = uint64_t{1} << log2;
  if (cursor.byte % word != 0) return {std::min(bytes, word - cursor.byte % word), 0};
  if (bytes < word) return {bytes, 0};
  // The kernel counts words from slot 0 of the first pair on.
  const uint64_t before = (done_slots * pair.slot_bytes + cursor.byte) >> log2;
  uint64_t words = bytes >> log2;
  if (before + words > kMaxWords || (per_pair >> log2) > kMaxWords) {
    const uint64_t in_pair = ((copy.slots - done_slots) * pair.slot_bytes - cursor.byte) >> log2;
    words = std::min({words, in_pair, kMaxWords / 2});
  }
  return {words << log2, log2};
}

// The runs at the cursor, as far as they have `least` bytes each and one call takes them.
Status DeviceCopier::start_engine(const TableRing::Entry& entry, const PagedCopy& copy, Cursor& cursor, uint64_t budget,
                                  uint64_t least, shim::CuStream stream, uint64_t& moved) noexcept {
  if (entry.form != DeviceForm::kPaged || !engine_) return kOkStatus;
  from_.clear();
  to_.clear();
  sizes_.clear();
  Cursor at = cursor;
  uint64_t bytes = 0;
  while (sizes_.size() < kMostBatched && bytes < budget) {
    const RegionPair& pair = copy.pairs[at.pair];
    const Run& run = copy.runs[at.run];
    const uint64_t left = (run.count - uint64_t{at.slot}) * pair.slot_bytes - at.byte;
    const uint64_t step = std::min(left, budget - bytes);
    if (!dense(pair) || step < least) break;
    const DevicePair& bases = pairs_of(entry)[at.pair];
    from_.push_back(bases.src + (uint64_t{run.src_slot} + at.slot) * pair.src_stride + at.byte);
    to_.push_back(bases.dst + (uint64_t{run.dst_slot} + at.slot) * pair.dst_stride + at.byte);
    sizes_.push_back(step);
    bytes += advance(copy, at, step);
  }
  if (bytes == 0) return kOkStatus;
  const shim::CudaDriver& api = shim::cuda().api;
  const bool batch = api.copy_batch_async != nullptr && sizes_.size() > 1;
  shim::CuResult result = shim::kCuSuccess;
  if (batch) {
    shim::CuCopyAttributes attributes{shim::kCuSourceStream, {}, {}, shim::kCuCopyOverlap};
    size_t first = 0, refused = 0;
    result = api.copy_batch_async(to_.data(), from_.data(), sizes_.data(), sizes_.size(), &attributes, &first, 1,
                                  &refused, stream);
  }
  for (size_t i = 0; !batch && i < sizes_.size() && result == shim::kCuSuccess; ++i)
    result = api.copy_async(to_[i], from_[i], sizes_[i], stream);
  if (result != shim::kCuSuccess) return fail_engine(result, batch ? "cuMemcpyBatchAsync" : "cuMemcpyAsync");
  cursor = at;
  moved += bytes;
  return kOkStatus;
}

}  // namespace pdxfer::pack
