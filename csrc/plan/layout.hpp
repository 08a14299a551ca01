// KV layouts and how two of them pair up: layers by global id (PP), groups (K, V), heads (unequal TP), state lists.
//
// The one place that knows where a page, a token and a head lie. Called when two ranks meet (a Pairing is kept and
// reused for every transfer between them), on the thread that sets up. Pure; throws Error(kInvalid) that gives both
// sides' values and what to change.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/types.hpp"

namespace pdxfer::plan {

struct LayoutBuffer {
  RegionId region = kNoId;
  uint64_t offset = 0;  // bytes from the region's first byte to page 0
};

// One rank's cache, or one of its state lists. Pages of a buffer lie back to back; inside a page tokens lie back to
// back; inside a token its heads, in global order.
struct Layout {
  std::vector<LayoutBuffer> buffers;  // groups x layers: K of every layer, then V of every layer
  std::vector<uint64_t> page_bytes;   // one for all buffers, or one per buffer; 0: this layer has no such buffer
  uint64_t slots = 0;                 // pages per buffer, padding page included
  uint32_t page_size = 1;             // tokens per page
  uint32_t groups = 1;                // 2: K and V; 1: one buffer per layer (MLA, state)
  std::vector<int64_t> layers;        // global layer ids, in buffer order; empty: 0, 1, 2, ...
  uint32_t total_heads = 0;           // KV heads of the model; 0: pages are whole and equal on every rank
  uint32_t tp_size = 1, tp_rank = 0;  // attention tensor parallelism of this side
  std::string dtype;                  // compared, not interpreted

  size_t layer_count() const noexcept { return groups == 0 ? 0 : buffers.size() / groups; }
  int64_t layer_id(size_t layer) const noexcept { return layers.empty() ? static_cast<int64_t>(layer) : layers[layer]; }
  uint64_t bytes_of_page(size_t buffer) const noexcept {
    return page_bytes.size() == 1 ? page_bytes[0] : page_bytes[buffer];
  }
  // Throws Error naming the field; `side` ("source", "destination") begins the text.
  void validate(const char* side) const;
};

struct Pairing {
  std::vector<RegionPair> pairs;          // source layer order within each group; slots as slots_per_page says
  uint32_t slots_per_page = 1;            // 1: a slot is a page; page_size: a slot is a token, heads are re-sharded
  uint64_t src_pages = 0, dst_pages = 0;  // page numbers of a side are below this
  // Another source rank that serves this destination holds the same bytes and comes first, so this one need not write:
  // KV heads (or whole pages) are replicated on more source ranks than the destination needs.
  bool redundant = false;

  // Bytes that one page moves, in all pairs together.
  uint64_t bytes_per_page() const noexcept;
};

Pairing pair_layouts(const Layout& src, const Layout& dst);

}  // namespace pdxfer::plan
