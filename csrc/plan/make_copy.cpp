// PagedCopy from page numbers or from address lists; see make_copy.hpp.
#include "plan/make_copy.hpp"

#include <string>

namespace pdxfer::plan {
namespace {

template <typename T>
PagedCopy make(const Pairing& pairing, std::span<const T> src_pages, std::span<const T> dst_pages, RunOptions options) {
  PagedCopy copy;
  copy.runs = find_runs(src_pages, dst_pages, pairing.src_pages, pairing.dst_pages, options);
  if (copy.runs.empty()) {
    copy.seal();
    return copy;
  }
  const uint32_t factor = pairing.slots_per_page;
  // A hand-made Pairing may not have gone through pair_layouts; the multiplication below must not wrap.
  if (factor == 0 || pairing.src_pages > UINT32_MAX / factor || pairing.dst_pages > UINT32_MAX / factor)
    throw Error(Code::kInvalid, "a pairing of " + std::to_string(pairing.src_pages) + " and " +
                                    std::to_string(pairing.dst_pages) + " pages x " + std::to_string(factor) +
                                    " slots exceeds 4294967295 slots: describe fewer pages per buffer");
  if (factor != 1)
    for (Run& run : copy.runs) run = {run.src_slot * factor, run.dst_slot * factor, run.count * factor};
  copy.pairs = pairing.pairs;
  copy.seal();
  return copy;
}

// The end of one side of an extent, refused when it does not fit 64 bits.
uint64_t end_of(const char* side, size_t i, uint64_t offset, uint64_t bytes) {
  uint64_t end = 0;
  if (__builtin_add_overflow(offset, bytes, &end))
    throw Error(Code::kInvalid, std::string(side) + "_offsets[" + std::to_string(i) + "] is " + std::to_string(offset) +
                                    " and its length " + std::to_string(bytes) + ": the sum does not fit 64 bits");
  return end;
}

}  // namespace

PagedCopy make_copy(const Pairing& pairing, std::span<const int32_t> src_pages, std::span<const int32_t> dst_pages,
                    RunOptions options) {
  return make(pairing, src_pages, dst_pages, options);
}

PagedCopy make_copy(const Pairing& pairing, std::span<const int64_t> src_pages, std::span<const int64_t> dst_pages,
                    RunOptions options) {
  return make(pairing, src_pages, dst_pages, options);
}

PagedCopy extents_copy(const Extents& x) {
  const size_t n = x.lengths.size();
  if (x.src_ids.size() != n || x.src_offsets.size() != n || x.dst_ids.size() != n || x.dst_offsets.size() != n)
    throw Error(Code::kInvalid, "address lists of unequal length: src_ids " + std::to_string(x.src_ids.size()) +
                                    ", src_offsets " + std::to_string(x.src_offsets.size()) + ", dst_ids " +
                                    std::to_string(x.dst_ids.size()) + ", dst_offsets " +
                                    std::to_string(x.dst_offsets.size()) + ", lengths " + std::to_string(n));
  PagedCopy copy;
  uint64_t src_end = 0, dst_end = 0;  // of the last pair
  for (size_t i = 0; i < n; ++i) {
    const uint64_t bytes = x.lengths[i];
    if (bytes == 0) continue;
    if (!copy.pairs.empty()) {
      RegionPair& last = copy.pairs.back();
      if (last.src == x.src_ids[i] && last.dst == x.dst_ids[i] && src_end == x.src_offsets[i] &&
          dst_end == x.dst_offsets[i]) {
        src_end = end_of("src", i, src_end, bytes);
        dst_end = end_of("dst", i, dst_end, bytes);
        last.src_stride = last.dst_stride = last.slot_bytes += bytes;
        continue;
      }
    }
    src_end = end_of("src", i, x.src_offsets[i], bytes);
    dst_end = end_of("dst", i, x.dst_offsets[i], bytes);
    copy.pairs.push_back({x.src_ids[i], x.dst_ids[i], x.src_offsets[i], x.dst_offsets[i], bytes, bytes, bytes});
  }
  if (!copy.pairs.empty()) copy.runs.push_back({0, 0, 1});
  copy.seal();
  return copy;
}

}  // namespace pdxfer::plan
