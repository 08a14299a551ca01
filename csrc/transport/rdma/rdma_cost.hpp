// The cost model: straight from and into pages, one request per extent, or packed through staging slots? Pure.
#pragma once

#include <algorithm>

#include "core/types.hpp"

namespace pdxfer::transport::rdma {

// What the link was measured to need; the defaults are those of a 100 Gb/s port until it was.
struct Rates {
  double request_ns = 150;  // of one more request in a chain
  double byte_ns = 0.08;    // on the wire
  double copied_ns = 0.15;  // per byte gathered or scattered
  double chunk_ns = 4000;   // of filling and draining the pipeline once: a slot's gather, a message, its scatter
};

// A request's cost as whole copies show it. The trial on the idle link can be far off (a device that is software,
// another end that is busy), and a cost taken for too low sends thousands of small requests. So: when two direct copies
// in turn, each alone on its link, took more than twice what was expected and than their bytes need, the quicker one
// counts.
class RequestCost {
 public:
  // What a direct copy of so many requests took; sets rates.request_ns.
  void learn(Rates& rates, uint64_t requests, uint64_t bytes, double ns) noexcept {
    constexpr uint64_t kEnough = 64;
    if (requests < kEnough) return;
    const double each = ns / static_cast<double>(requests);
    if (each < 2 * rates.request_ns || ns < 2 * static_cast<double>(bytes) * rates.byte_ns) {
      before_ = 0;
      return;
    }
    if (before_ > 0) rates.request_ns = std::min(before_, each);
    before_ = before_ > 0 ? 0 : each;
  }

 private:
  double before_ = 0;
};

struct Estimate {
  double direct_ns = 0, packed_ns = 0;
  uint64_t requests = 0;
  bool packed() const noexcept { return packed_ns < direct_ns; }
};

inline uint64_t count_extents(const PagedCopy& copy) noexcept {
  uint64_t extents = 0;
  for (const RegionPair& p : copy.pairs)
    extents += p.src_stride == p.slot_bytes && p.dst_stride == p.slot_bytes ? copy.runs.size() : copy.slots;
  return extents;
}

// Gather, wire and scatter overlap, so the slowest of them counts; requests and bytes of the direct path do too.
inline Estimate estimate(const PagedCopy& copy, const Rates& rates) noexcept {
  const auto bytes = static_cast<double>(copy.bytes);
  Estimate e;
  e.requests = count_extents(copy);
  e.direct_ns = std::max(static_cast<double>(e.requests) * rates.request_ns, bytes * rates.byte_ns);
  e.packed_ns = std::max(bytes * rates.copied_ns, bytes * rates.byte_ns) + 2 * rates.chunk_ns;
  return e;
}

}  // namespace pdxfer::transport::rdma
