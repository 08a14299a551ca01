// Memory of the fake device and copies over it, for the tests of DeviceCopier.
#pragma once

#include <doctest/doctest.h>

#include <chrono>
#include <cstring>
#include <functional>
#include <thread>

#include "fake/fake_cuda.hpp"
#include "pack/device_copier.hpp"

namespace pdxfer::pack {

inline void wait_for(DeviceCopier& copier, DeviceTicket ticket) {
  bool over = false;
  for (int i = 0; i < 100000 && !over; ++i) {
    REQUIRE(copier.done(ticket, over).ok());
    if (!over) std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
  REQUIRE(over);
}

inline PagedCopy pages(uint64_t bytes, uint32_t count) {
  PagedCopy copy;
  copy.pairs = {{1, 2, 0, 0, bytes, bytes, bytes}};
  for (uint32_t i = 0; i < count; ++i) copy.runs.push_back({i, count - 1 - i, 1});
  copy.seal();
  return copy;
}

struct Buffers {
  explicit Buffers(size_t bytes) : src(fake_cuda::allocate(0, bytes)), dst(fake_cuda::allocate(0, bytes)) {
    for (size_t i = 0; i < bytes; ++i) src[i] = static_cast<std::byte>(i * 131 >> 3);
  }
  ~Buffers() {
    fake_cuda::release(src);
    fake_cuda::release(dst);
  }
  std::byte *src, *dst;
};

// One run of 1 KiB slots in each buffer; gap_before(i), which never shrinks, is how much further than back to back
// buffer i begins.
inline PagedCopy buffers(uint32_t pairs, uint32_t run, const std::function<uint64_t(uint64_t)>& gap_before) {
  PagedCopy copy;
  for (uint64_t i = 0; i < pairs; ++i) {
    const uint64_t at = (i * run << 10) + gap_before(i);
    copy.pairs.push_back({1, 2, at, at, 1024, 1024, 1024});
  }
  copy.runs = {{0, 0, run}};
  copy.seal();
  return copy;
}

}  // namespace pdxfer::pack
