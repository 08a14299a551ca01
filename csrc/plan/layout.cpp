// Pairing of two layouts; see layout.hpp. Head ranges are intersected in global head numbers, which covers equal TP,
// sharding finer or coarser on either side, and replicated heads with one rule.
#include "plan/layout.hpp"

#include <algorithm>
#include <concepts>
#include <unordered_map>
#include <utility>

namespace pdxfer::plan {
namespace {

template <std::integral T>
std::string text(T value) {
  return std::to_string(value);
}
std::string text(const std::string& value) {
  std::string quoted = "'";
  quoted += value;
  return quoted += '\'';
}

[[noreturn]] void refuse(const std::string& what) { throw Error(Code::kInvalid, what); }

template <typename T>
void same(const char* field, const T& src, const T& dst, const char* fix) {
  if (src != dst)
    refuse(std::string("layouts differ in ") + field + ": source " + text(src) + ", destination " + text(dst) + ": " +
           fix);
}

// Global KV heads of one rank: [first, first + count). More ranks than heads: consecutive ranks hold the same head.
struct Heads {
  uint32_t first = 0, count = 0;
  uint32_t replicas = 1;  // ranks that hold the same heads
};

Heads heads_of(const Layout& layout) noexcept {
  const uint32_t total = layout.total_heads, ranks = layout.tp_size;
  if (total == 0) return {0, 1, ranks};
  if (ranks <= total) return {layout.tp_rank * (total / ranks), total / ranks, 1};
  return {layout.tp_rank / (ranks / total), 1, ranks / total};
}

// Rank d of the destination is served by source ranks [d * k, d * k + k), k = source TP / destination TP; with the
// destination finer than the source each has one server. Of servers with equal bytes the first writes.
bool is_redundant(const Layout& src, const Layout& dst, const Heads& src_heads) noexcept {
  if (src.tp_size <= dst.tp_size || src.tp_size % dst.tp_size != 0) return false;
  const uint32_t servers = src.tp_size / dst.tp_size, first_server = dst.tp_rank * servers;
  if (src.tp_rank / servers != dst.tp_rank) return false;  // paired by another rule: nothing is known of its fellows
  const uint32_t first_replica = src.tp_rank / src_heads.replicas * src_heads.replicas;
  return src.tp_rank != std::max(first_server, first_replica);
}

// What is the same for every pair of buffers: which heads move, and whether a slot is a page or a token.
struct Slice {
  uint32_t src_heads = 1, dst_heads = 1;  // heads in a token of each side
  uint32_t src_first = 0, dst_first = 0;  // first moved head within the token
  uint32_t count = 1;                     // heads moved
  uint32_t slots_per_page = 1;
};

Slice slice_heads(const Layout& src, const Layout& dst, const Heads& s, const Heads& d) {
  if (src.total_heads == 0) return {};
  const uint32_t first = std::max(s.first, d.first), end = std::min(s.first + s.count, d.first + d.count);
  if (first >= end)
    refuse("source rank " + text(src.tp_rank) + " of " + text(src.tp_size) + " holds KV heads [" + text(s.first) +
           ", " + text(s.first + s.count) + "), destination rank " + text(dst.tp_rank) + " of " + text(dst.tp_size) +
           " [" + text(d.first) + ", " + text(d.first + d.count) +
           "): they share none; pair ranks that hold the same heads");
  Slice slice{s.count, d.count, first - s.first, first - d.first, end - first, 1};
  if (s.count != slice.count || d.count != slice.count) slice.slots_per_page = src.page_size;
  return slice;
}

struct Place {
  const Layout& layout;
  const char* side;
  size_t buffer;
  std::string name() const {
    const size_t layers = layout.layer_count();
    return std::string(side) + " buffer " + text(buffer) + " (layer " + text(layout.layer_id(buffer % layers)) +
           ", group " + text(buffer / layers) + ")";
  }
};

uint64_t head_bytes(const Place& at, uint32_t heads) {
  const uint64_t page = at.layout.bytes_of_page(at.buffer), parts = uint64_t{at.layout.page_size} * heads;
  if (page % parts != 0)
    refuse(at.name() + " has pages of " + text(page) + " bytes, which " + text(at.layout.page_size) + " tokens x " +
           text(heads) + " heads do not divide: give page_bytes = page_size * heads of the rank * bytes of a head");
  return page / parts;
}

// One buffer of each side; false when both sides elide it.
bool pair_buffers(const Place& src, const Place& dst, const Slice& slice, RegionPair& pair) {
  const uint64_t src_page = src.layout.bytes_of_page(src.buffer), dst_page = dst.layout.bytes_of_page(dst.buffer);
  if (src_page == 0 && dst_page == 0) return false;
  const LayoutBuffer &from = src.layout.buffers[src.buffer], &to = dst.layout.buffers[dst.buffer];
  const uint64_t src_head = head_bytes(src, slice.src_heads), dst_head = head_bytes(dst, slice.dst_heads);
  if (src_head != dst_head) {
    const std::string unit = src.layout.total_heads == 0 ? " bytes per page" : " bytes per head and token";
    refuse(src.name() + " has " + text(src_head) + unit + " (page_bytes " + text(src_page) + "), " + dst.name() + " " +
           text(dst_head) + " (page_bytes " + text(dst_page) +
           "): give each side its own page_bytes, tp_size and total_heads");
  }
  const uint64_t slots = slice.slots_per_page;
  pair = {from.region,
          to.region,
          from.offset + slice.src_first * src_head,
          to.offset + slice.dst_first * dst_head,
          src_page / slots,
          dst_page / slots,
          0};
  // With whole pages all heads move; with tokens the moved heads of one.
  pair.slot_bytes = slots == 1 ? slice.count * uint64_t{src.layout.page_size} * src_head : slice.count * src_head;
  return true;
}

void check_sides(const Layout& src, const Layout& dst) {
  src.validate("source");
  dst.validate("destination");
  same("dtype", src.dtype, dst.dtype, "both ends must keep the cache in one dtype");
  same("page_size", src.page_size, dst.page_size, "both ends must use one page size");
  same("groups", src.groups, dst.groups, "give 2 for K and V buffers, 1 for MLA or state, on both");
  same("total_heads", src.total_heads, dst.total_heads, "give the model's number of KV heads, the same on both, or 0");
}

uint64_t end_of(const Layout& layout, size_t buffer) {
  uint64_t end = 0;
  if (__builtin_mul_overflow(layout.slots, layout.bytes_of_page(buffer), &end) ||
      __builtin_add_overflow(end, layout.buffers[buffer].offset, &end))
    refuse("buffer " + text(buffer) + " of " + text(layout.slots) + " pages x " + text(layout.bytes_of_page(buffer)) +
           " bytes at offset " + text(layout.buffers[buffer].offset) + " does not fit 64 bits");
  return end;
}

// Two buffers on the same bytes would overwrite each other at the destination.
void check_overlap(const Layout& dst) {
  std::vector<size_t> order;
  for (size_t b = 0; b < dst.buffers.size(); ++b)
    if (dst.bytes_of_page(b) != 0) order.push_back(b);
  const auto key = [&](size_t b) { return std::pair(dst.buffers[b].region, dst.buffers[b].offset); };
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return key(a) < key(b); });
  for (size_t i = 1; i < order.size(); ++i) {
    const size_t a = order[i - 1], b = order[i];
    if (dst.buffers[a].region == dst.buffers[b].region && end_of(dst, a) > dst.buffers[b].offset)
      refuse(Place{dst, "destination", a}.name() + " spans bytes [" + text(dst.buffers[a].offset) + ", " +
             text(end_of(dst, a)) + ") of region " + text(dst.buffers[a].region) + " and " +
             Place{dst, "destination", b}.name() + " begins at " + text(dst.buffers[b].offset) +
             ": buffers must not overlap; check offsets, page_bytes and slots");
  }
}

}  // namespace

void Layout::validate(const char* side) const {
  const std::string who = std::string(side) + " layout: ";
  if (groups == 0) refuse(who + "groups is 0: give 2 for K and V buffers, 1 for MLA or state");
  if (buffers.empty()) refuse(who + "no buffers: give one (region, offset) per group and layer");
  if (buffers.size() % groups != 0)
    refuse(who + text(buffers.size()) + " buffers do not divide into " + text(groups) + " groups of layers");
  if (!layers.empty() && layers.size() != layer_count())
    refuse(who + text(layers.size()) + " layer ids for " + text(buffers.size()) + " buffers in " + text(groups) +
           " groups: give one id per layer, " + text(layer_count()));
  if (page_bytes.size() != 1 && page_bytes.size() != buffers.size())
    refuse(who + text(page_bytes.size()) + " page_bytes for " + text(buffers.size()) +
           " buffers: give one, or one each");
  if (page_size == 0) refuse(who + "page_size is 0: give the tokens of a page, at least 1");
  if (slots == 0) refuse(who + "slots is 0: give the pages of a buffer");
  if (slots > UINT32_MAX / page_size)
    refuse(who + text(slots) + " pages of " + text(page_size) + " tokens exceed 4294967295 token slots");
  if (tp_size == 0 || tp_rank >= tp_size)
    refuse(who + "tp_rank " + text(tp_rank) + " is not below tp_size " + text(tp_size));
  if (total_heads != 0 && total_heads % tp_size != 0 && tp_size % total_heads != 0)
    refuse(who + text(total_heads) + " KV heads over tp_size " + text(tp_size) +
           ": one must divide the other, so that every rank holds whole heads");
  for (size_t b = 0; b < buffers.size(); ++b) {
    if (bytes_of_page(b) != 0 && buffers[b].region == kNoId)
      refuse(who + "buffer " + text(b) +
             " has region id 0: register its memory first, or give page_bytes 0 to elide it");
    end_of(*this, b);
  }
}

uint64_t Pairing::bytes_per_page() const noexcept {
  uint64_t bytes = 0;
  for (const RegionPair& p : pairs) bytes += p.slot_bytes * slots_per_page;
  return bytes;
}

Pairing pair_layouts(const Layout& src, const Layout& dst) {
  check_sides(src, dst);
  check_overlap(dst);
  std::unordered_map<int64_t, size_t> dst_layer;
  for (size_t l = 0; l < dst.layer_count(); ++l)
    if (!dst_layer.emplace(dst.layer_id(l), l).second)
      refuse("destination layout names layer " + text(dst.layer_id(l)) + " twice: layers pair by id");
  const Heads src_heads = heads_of(src), dst_heads = heads_of(dst);
  const Slice slice = slice_heads(src, dst, src_heads, dst_heads);
  Pairing out;
  out.slots_per_page = slice.slots_per_page;
  out.src_pages = src.slots;
  out.dst_pages = dst.slots;
  out.redundant = is_redundant(src, dst, src_heads);
  std::vector<bool> used(dst.layer_count(), false);
  bool common = false;
  for (size_t l = 0; l < src.layer_count(); ++l) {
    const auto at = dst_layer.find(src.layer_id(l));
    if (at == dst_layer.end()) continue;
    if (used[at->second]) refuse("source layout names layer " + text(src.layer_id(l)) + " twice: layers pair by id");
    common = used[at->second] = true;
  }
  if (!common)
    refuse("layouts have no layer in common: source " + text(src.layer_count()) + " layers from id " +
           text(src.layer_id(0)) + ", destination " + text(dst.layer_count()) + " from id " + text(dst.layer_id(0)) +
           ": give global layer ids, and connect pipeline stages that share layers");
  out.pairs.reserve(src.buffers.size());
  for (uint32_t g = 0; g < src.groups; ++g) {
    for (size_t l = 0; l < src.layer_count(); ++l) {
      const auto at = dst_layer.find(src.layer_id(l));
      if (at == dst_layer.end()) continue;
      RegionPair pair;
      if (pair_buffers({src, "source", g * src.layer_count() + l},
                       {dst, "destination", g * dst.layer_count() + at->second}, slice, pair))
        out.pairs.push_back(pair);
    }
  }
  return out;
}

}  // namespace pdxfer::plan
