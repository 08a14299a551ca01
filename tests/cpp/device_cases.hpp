// Cases about what only the way through pinned slots can get wrong. Included after PDXFER_CONFORMANCE by the test files
// of transports that take it.
#pragma once

#include "conformance.hpp"
#include "fake_device_copy.hpp"

namespace conformance {

// A GPU that fails in the middle: its batches end with a typed status, once; what the sender is told is true.
inline void device_error_is_typed(const Factory& make, int64_t good) {
  CAPTURE(good);
  Batches batches;
  {
    End a(make, small_chunks()), b(make, small_chunks());
    Memory& src = a.add(2, 2 << 20);
    Memory& dst = b.add(4, 2 << 20);
    Pair pair(a, b);
    faults().good = good;
    for (BatchId id = 1; id <= 4; ++id)
      batches.push_back(std::make_unique<Batch>(*pair.ab, id, plan_of(part_copy(src, dst, 1024, id - 1, 4)), id));
    REQUIRE(run(pair, batches, a));
    pair.poll_for(std::chrono::milliseconds(20));
    CHECK(a.sent.size() == 4);
    int failed = 0;
    for (const Completion& c : a.sent) {
      if (c.status.ok()) continue;
      ++failed;
      CHECK_MESSAGE(c.status.code == Code::kInternal, c.status.to_string());
    }
    CHECK(failed > 0);
    for (auto& batch : batches)  // what was acknowledged is in place
      if (a.find_sent(batch->id)->status.ok()) expect_plan(batch->plan, a.memories, b.memories);
    for (auto& batch : batches) {
      if (!a.find_sent(batch->id)->status.ok()) continue;
      const uint64_t part = dst.bytes() / 4, at = (batch->id - 1) * part;
      CHECK(std::memcmp(dst.data() + at, dst.expected_data() + at, part) == 0);
    }
    CHECK(pair.ab->lost().ok());
    // The fence: nothing changes any more.
    dst.expect_present();
    pair.poll_for(std::chrono::milliseconds(20));
    CHECK(dst.as_expected());
    faults().good = -1;
  }
  CHECK(faults().tables == 0);
  CHECK(faults().pinned == 0);
}

// More pieces than slots, and more tables than there is room for, only take longer.
inline void little_room_is_enough(const Factory& make) {
  Batches batches;
  {
    Limits limits = small_chunks();
    limits.io_threads = 1;
    End a(make, limits), b(make, limits);
    Memory& src = a.add(2, 4 << 20);
    Memory& dst = b.add(4, 16 << 20);
    Pair pair(a, b);
    for (BatchId id = 1; id <= 32; ++id) {
      batches.push_back(std::make_unique<Batch>(*pair.ab, id, plan_of(part_copy(src, dst, 1024, id - 1, 32)), id));
      expect_plan(batches.back()->plan, a.memories, b.memories);
    }
    REQUIRE(run(pair, batches, a));
    for (const Completion& c : a.sent) CHECK_MESSAGE(c.status.ok(), c.status.to_string());
    CHECK(b.memory_as_expected());
    CHECK(faults().pinned > 0);
    CHECK(faults().pinned <= 2 * 2 * (1 << 20));  // two ends, two directions, Limits::staging_bytes each
  }
  CHECK(faults().tables == 0);
  CHECK(faults().pinned == 0);
}

}  // namespace conformance

TEST_CASE("a device error is typed, and a fence") {
  for (const int64_t good : {0, 1, 5, 11, 20}) conformance::device_error_is_typed(kFactory, good);
}
TEST_CASE("little room is enough") { conformance::little_room_is_enough(kFactory); }
TEST_CASE("a GPU that is not there is refused by name") {
  conformance::End a(kFactory);
  std::byte some[16];
  CHECK_THROWS_WITH_AS(a.transport->register_memory({7, {some, 16, 9}}), doctest::Contains("CUDA device 9"),
                       pdxfer::Error);
}
