// The half of DeviceCopier that takes a piece apart: what of it is a copy of the copy engine, and what one kernel
// moves. See device_copier.hpp.
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

// The driver refuses copies that leave an allocation (CUDA_ERROR_INVALID_VALUE), whatever comes next to it; a region
// lies in one, or in pieces that the driver takes for one.
bool same_allocations(const RegionPair& a, const RegionPair& b) noexcept { return a.src == b.src && a.dst == b.dst; }

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

// Equal runs an equal distance apart in one region, as where one holds all layers, are the rows of one engine copy.
// Takes the pairs from the cursor on that fit the budget, in the order of their addresses, as they may come in any.
// Moves nothing where so many such copies would be needed that the kernel is ahead, or the two together.
Status DeviceCopier::launch_rows(const TableRing::Entry& entry, const PagedCopy& copy, Cursor& cursor, uint64_t budget,
                                 uint64_t& moved) noexcept {
  const RegionPair& pair = copy.pairs[cursor.pair];
  const uint64_t row = copy.slots * pair.slot_bytes;
  if (entry.form != DeviceForm::kPaged || !engine_ || !dense(pair) || copy.runs.size() != 1 || row < kEngineRow ||
      cursor != Cursor{cursor.pair, 0, 0, 0})
    return kOkStatus;
  const uint64_t most = std::min<uint64_t>({entry.pairs - cursor.pair, budget / row, row_order_.capacity()});
  row_order_.clear();
  for (uint32_t i = cursor.pair; row_order_.size() < most && alike(copy.pairs[i], pair); ++i) row_order_.push_back(i);
  const DevicePair* bases = pairs_of(entry);
  std::ranges::sort(row_order_, {}, [&](uint32_t i) { return bases[i].src; });
  size_t copies = 0;
  for (size_t i = 0; i < row_order_.size(); i += rows_of(copy, bases, i, row).rows) ++copies;
  const uint64_t least = copies == 1 || row < kSharedBytes ? kEngineBytes : kEngineAloneBytes;
  if (copies == row_order_.size() || copies * least > row_order_.size() * row) return kOkStatus;
  const Run& run = copy.runs[0];
  for (size_t i = 0; i < row_order_.size();) {
    shim::CuCopy2d rows = rows_of(copy, bases, i, row);
    i += rows.rows;
    rows.from.device += run.src_slot * pair.src_stride;
    rows.to.device += run.dst_slot * pair.dst_stride;
    if (const auto r = shim::cuda().api.copy_2d_async(&rows, stream_.get()); r != shim::kCuSuccess)
      return fail_engine(r, "cuMemcpy2DAsync");
  }
  moved += row_order_.size() * row;
  cursor.pair += static_cast<uint32_t>(row_order_.size());
  return kOkStatus;
}

// The pairs from the i-th of row_order_ on that are rows of one copy, from slot 0 on.
shim::CuCopy2d DeviceCopier::rows_of(const PagedCopy& copy, const DevicePair* bases, size_t i,
                                     uint64_t row) const noexcept {
  shim::CuCopy2d rows{};
  rows.from.type = rows.to.type = shim::kCuMemoryUnified;
  rows.from.device = bases[row_order_[i]].src;
  rows.to.device = bases[row_order_[i]].dst;
  rows.row_bytes = rows.from.pitch = rows.to.pitch = row;
  rows.rows = 1;
  const auto step = [&](size_t at, auto side) { return bases[row_order_[at]].*side - bases[row_order_[at - 1]].*side; };
  for (size_t at = i + 1; at < row_order_.size(); ++at, ++rows.rows) {
    if (!same_allocations(copy.pairs[row_order_[at]], copy.pairs[row_order_[i]])) break;
    const uint64_t src = step(at, &DevicePair::src), dst = step(at, &DevicePair::dst);
    if (rows.rows == 1 && std::min(src, dst) >= row && std::max(src, dst) <= max_pitch_ &&
        (src | dst) % kPitchUnit == 0)
      rows.from.pitch = src, rows.to.pitch = dst;
    else if (rows.rows == 1 || src != rows.from.pitch || dst != rows.to.pitch)
      break;
  }
  return rows;
}

// Of a piece whose runs are all long enough to be shared: the bytes at its beginning that are the kernel's. 0: of
// others.
uint64_t DeviceCopier::kernel_share(const TableRing::Entry& entry, const PagedCopy& copy, const Cursor& cursor,
                                    uint64_t budget) const noexcept {
  const RegionPair& pair = copy.pairs[cursor.pair];
  if (entry.form != DeviceForm::kPaged || !engine_ || !dense(pair) || budget < 4 * kSharedBytes) return 0;
  bool longest = true;  // the copy engine alone is ahead
  for (const Run& run : copy.runs) {
    if (run.count * pair.slot_bytes < kSharedBytes) return 0;
    longest = longest && run.count * pair.slot_bytes >= kEngineAloneBytes;
  }
  if (longest) return 0;
  uint64_t share = 0;  // whole runs: what is left of one might be too short for the engine
  for (Cursor at = cursor; share < budget / 64 * kKernelShare;) {
    const uint64_t slots = copy.runs[at.run].count - uint64_t{at.slot};
    share += advance(copy, at, slots * copy.pairs[at.pair].slot_bytes - at.byte);
  }
  return share < budget ? share : 0;  // a single run: the engine's
}

// The longest part at the cursor that one kernel or one engine copy can move.
DeviceCopier::Part DeviceCopier::next_part(const TableRing::Entry& entry, const PagedCopy& copy, const Cursor& cursor,
                                           uint64_t budget, uint64_t buffer, uint64_t engine_from) const noexcept {
  const RegionPair& pair = copy.pairs[cursor.pair];
  const DevicePair* bases = pairs_of(entry);
  const uint64_t done_slots = slots_before(entry, cursor);
  if (entry.form == DeviceForm::kPaged && engine_ && dense(pair)) {
    const uint64_t run = (copy.runs[cursor.run].count - uint64_t{cursor.slot}) * pair.slot_bytes - cursor.byte;
    if (run >= engine_from && budget >= engine_from) return {std::min(run, budget), 0, true};
  }
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
  if (cursor.byte % word != 0) return {std::min(bytes, word - cursor.byte % word), 0, false};
  if (bytes < word) return {bytes, 0, false};
  // The kernel counts words from slot 0 of the first pair on.
  const uint64_t before = (done_slots * pair.slot_bytes + cursor.byte) >> log2;
  uint64_t words = bytes >> log2;
  if (before + words > kMaxWords || (per_pair >> log2) > kMaxWords) {
    const uint64_t in_pair = ((copy.slots - done_slots) * pair.slot_bytes - cursor.byte) >> log2;
    words = std::min({words, in_pair, kMaxWords / 2});
  }
  return {words << log2, log2, false};
}

Status DeviceCopier::start_engine(const TableRing::Entry& entry, const PagedCopy& copy, const Cursor& cursor,
                                  const Part& part) noexcept {
  const RegionPair& pair = copy.pairs[cursor.pair];
  const DevicePair* bases = pairs_of(entry) + cursor.pair;
  const Run& run = copy.runs[cursor.run];
  const uint64_t src = bases->src + (uint64_t{run.src_slot} + cursor.slot) * pair.src_stride + cursor.byte;
  const uint64_t dst = bases->dst + (uint64_t{run.dst_slot} + cursor.slot) * pair.dst_stride + cursor.byte;
  const shim::CuStream stream = (part.beside ? beside_ : stream_).get();
  const auto result = shim::cuda().api.copy_async(dst, src, part.bytes, stream);
  return result == shim::kCuSuccess ? kOkStatus : fail_engine(result, "cuMemcpyAsync");
}

}  // namespace pdxfer::pack
