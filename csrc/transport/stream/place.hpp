// Place: where a region of a pair begins in this process, and on which device. Worker and io threads.
#pragma once

#include <cstddef>
#include <vector>

#include "core/types.hpp"

namespace pdxfer::transport::stream {

struct Place {
  std::byte* base = nullptr;
  int device = kHost;
};

// The first pair from `pair` on whose memory is another device's; `places` has one entry per pair.
inline uint32_t same_device_end(const std::vector<Place>& places, uint32_t pair) noexcept {
  uint32_t end = pair;
  while (end < places.size() && places[end].device == places[pair].device) ++end;
  return end;
}

}  // namespace pdxfer::transport::stream
