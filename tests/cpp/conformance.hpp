// The conformance suite of the seam: the eight clauses of transport.hpp (and the promises of register_memory) between
// two ends of one transport in this process. A test file names its factory:
//   PDXFER_CONFORMANCE([](transport::Context c) { return transport::make_loopback(std::move(c)); })
//
// Seeded, so that a failure repeats; every wait is bounded by kPatience.
#pragma once

#include "conformance_link.hpp"

namespace conformance {

inline Limits small_chunks() {
  Limits limits;
  limits.chunk_bytes = limits.device_chunk_bytes = 64 << 10;
  limits.io_threads = 2;
  limits.tcp_streams = 3;
  return limits;
}

inline Bytes random_bytes(Random& random, size_t n) {
  Bytes bytes(n);
  for (std::byte& b : bytes) b = static_cast<std::byte>(random());
  return bytes;
}

// Clauses 2 to 5: random layouts both ways at once arrive bit for bit, with their tails, and nothing else changes.
inline void moves_random_layouts(const Factory& make) {
  for (uint64_t seed = 1; seed <= 12; ++seed) {
    CAPTURE(seed);
    Random random(seed);
    End a(make, seed % 2 == 0 ? small_chunks() : Limits{}), b(make, small_chunks());
    Batches batches[2];
    for (RegionId id = 1; id <= 2; ++id) {
      a.add(id, 300000 + 1000 * id);  // sources and, in the other direction, destinations:
      a.add(id + 4, 280000);          // separate regions, so that the oracle needs no order
      b.add(id + 10, 310000);
      b.add(id + 14, 290000 + 77 * id);
    }
    Pair pair(a, b);
    static constexpr uint64_t kSlotBytes[] = {1, 7, 64, 100, 1024, 1152, 4096, 16384, 70000};
    for (int direction = 0; direction < 2; ++direction) {
      End& from = direction == 0 ? a : b;
      End& to = direction == 0 ? b : a;
      const MemoryList src{from.memories[0].get(), from.memories[2].get()};
      const MemoryList dst{to.memories[1].get(), to.memories[3].get()};
      TransferPlan plan;
      const uint64_t slot = kSlotBytes[pick(random, 0, std::size(kSlotBytes) - 1)];
      plan.copies.push_back(random_copy(
          random, {pick(random, 1, 6), pick(random, 1, 400), slot, pick(random, 0, 1) == 1, pick(random, 1, 9)}, src,
          dst));
      if (pick(random, 0, 3) == 0) plan.copies.push_back(PagedCopy{});  // a component without pages this time
      expect_plan(plan, from.memories, to.memories);
      batches[direction].push_back(std::make_unique<Batch>(direction == 0 ? *pair.ab : *pair.ba, 100 + seed, plan, seed,
                                                           random_bytes(random, pick(random, 0, 500))));
    }
    Batch& out = *batches[0][0];
    Batch& back = *batches[1][0];
    REQUIRE(pair.poll_until([&] {
      out.step();
      back.step();
      return !a.sent.empty() && !b.sent.empty() && !a.arrived.empty() && !b.arrived.empty();
    }));
    CHECK_MESSAGE(a.sent[0].status.ok(), a.sent[0].status.to_string());
    CHECK_MESSAGE(b.sent[0].status.ok(), b.sent[0].status.to_string());
    CHECK(a.sent[0].peer == 2);
    CHECK(b.arrived[0].peer == 1);
    CHECK(b.arrived[0].batch == 100 + seed);
    CHECK(b.arrived[0].tag == seed);
    CHECK(b.arrived[0].status.ok());
    CHECK(b.arrived[0].tail == out.tail);
    CHECK(a.arrived[0].tail == back.tail);
    CHECK(a.memory_as_expected());
    CHECK(b.memory_as_expected());
  }
}

// Clause 1: without a poll, submit neither blocks nor takes more than about a chunk at a time; afterwards all is well.
inline void submit_never_blocks(const Factory& make) {
  End a(make, small_chunks()), b(make, small_chunks());
  Memory& src = a.add(1, 2 << 20);
  Memory& dst = b.add(2, 12 << 20);
  Batches batches;
  Pair pair(a, b);
  for (BatchId id = 1; id <= 6; ++id)
    batches.push_back(std::make_unique<Batch>(*pair.ab, id, plan_of(part_copy(src, dst, 4096, id - 1, 6)), id));
  for (auto& batch : batches) expect_plan(batch->plan, a.memories, b.memories);
  for (int turn = 0; turn < 3000; ++turn) {
    Batch& batch = *batches[static_cast<size_t>(turn) % batches.size()];
    const Cursor before = batch.cursor;
    const auto start = Clock::now();
    batch.step();
    CHECK(Clock::now() - start < std::chrono::seconds(2));
    if (batch.cursor.pair != 0 || batch.notified) continue;  // at its end
    const uint64_t moved = (batch.cursor.slot - before.slot) * uint64_t{4096};
    CHECK(moved <= 2 * small_chunks().chunk_bytes);
  }
  REQUIRE(run(pair, batches, a));
  REQUIRE(pair.poll_until([&] { return b.arrived.size() == 6; }));
  for (const Completion& c : a.sent) CHECK(c.status.ok());
  CHECK(b.memory_as_expected());
  CHECK(a.wakes->load() > 0);
  CHECK(b.wakes->load() > 0);
}

// Clauses 3 and 4: many batches, tagged and not, empty ones, tails up to the limit; each completes exactly once.
inline void completes_exactly_once(const Factory& make) {
  End a(make, small_chunks()), b(make, small_chunks());
  Memory& src = a.add(1, 1 << 20);
  Memory& dst = b.add(2, 120 * (128 << 10));
  Batches batches;
  Pair pair(a, b);
  Random random(5);
  const uint64_t limit = Limits{}.max_tail_bytes;
  for (BatchId id = 1; id <= 120; ++id) {
    PagedCopy copy;
    if (id % 5 != 0) copy = part_copy(src, dst, id % 3 == 0 ? 32 << 10 : 4096, id - 1, 120);
    if (id % 5 != 0 && id % 7 != 0) copy.runs[0].count = 1 + static_cast<uint32_t>(id % 4);
    copy.seal();
    const bool tagged = id % 4 != 0;
    batches.push_back(std::make_unique<Batch>(*pair.ab, id, plan_of(std::move(copy)),
                                              tagged ? std::optional<uint64_t>(id) : std::nullopt,
                                              random_bytes(random, !tagged        ? 0
                                                                   : id % 10 == 1 ? limit
                                                                                  : id % 50)));
    expect_plan(batches.back()->plan, a.memories, b.memories);
  }
  REQUIRE(run(pair, batches, a));
  REQUIRE(pair.poll_until([&] { return b.arrived.size() == 90; }));
  pair.poll_for(std::chrono::milliseconds(20));
  CHECK(a.sent.size() == 120);
  CHECK(b.arrived.size() == 90);
  for (auto& batch : batches) {
    const Completion* sent = a.find_sent(batch->id);
    REQUIRE(sent != nullptr);
    CHECK_MESSAGE(sent->status.ok(), sent->status.to_string());
    if (!batch->tag.has_value()) continue;
    const Completion* arrived = b.find_arrived(*batch->tag);
    REQUIRE(arrived != nullptr);
    CHECK(arrived->status.ok());
    CHECK(arrived->tail == batch->tail);
  }
  CHECK(b.memory_as_expected());
  batches.clear();
  batches.push_back(std::make_unique<Batch>(*pair.ab, 500, TransferPlan{}, 500, Bytes(limit + 1)));
  REQUIRE(run(pair, batches, a));
  CHECK(a.find_sent(500)->status.code == Code::kInvalid);
}

// Clause 5: what arrived is there when poll says so, seen from a thread of its own at each end.
inline void arrived_is_visible(const Factory& make) {
  End a(make, small_chunks()), b(make, small_chunks());
  Memory& src = a.add(1, 512 << 10);
  Memory& dst = b.add(2, 512 << 10);
  Batches batches;
  Pair pair(a, b);
  constexpr uint64_t kRounds = 20;
  std::atomic<uint64_t> seen{0};
  std::atomic<bool> wrong{false};
  std::thread receiver([&] {
    const auto deadline = Clock::now() + kPatience;
    for (uint64_t round = 1; round <= kRounds && Clock::now() < deadline;) {
      if (b.find_arrived(round) == nullptr) {
        b.poll();
        continue;
      }
      for (uint64_t i = 0; i < dst.bytes(); ++i)
        if (dst.data()[i] != static_cast<std::byte>(round)) wrong = true;
      seen = round++;
    }
  });
  for (uint64_t round = 1; round <= kRounds; ++round) {
    std::fill_n(src.data(), src.bytes(), static_cast<std::byte>(round));
    batches.push_back(std::make_unique<Batch>(*pair.ab, round, plan_of(whole_copy(src, dst, 1024)), round));
    const auto deadline = Clock::now() + kPatience;
    while (a.find_sent(round) == nullptr && Clock::now() < deadline)
      if (!batches.back()->step()) a.poll();
    while (seen < round && Clock::now() < deadline) std::this_thread::yield();
  }
  receiver.join();
  CHECK(seen == kRounds);
  CHECK_FALSE(wrong);
}

}  // namespace conformance

#include "conformance_faults.hpp"
#include "conformance_setup.hpp"

// One test case per clause for the given factory.
#define PDXFER_CONFORMANCE(...)                                                                              \
  static const conformance::Factory kFactory = __VA_ARGS__;                                                  \
  TEST_CASE("random layouts move bit for bit") { conformance::moves_random_layouts(kFactory); }              \
  TEST_CASE("submit never blocks") { conformance::submit_never_blocks(kFactory); }                           \
  TEST_CASE("every batch completes exactly once") { conformance::completes_exactly_once(kFactory); }         \
  TEST_CASE("what arrived is visible") { conformance::arrived_is_visible(kFactory); }                        \
  TEST_CASE("a lost peer is lost alone") { conformance::lost_peer_is_lost_alone(kFactory); }                 \
  TEST_CASE("a bad id, index or range touches nothing") { conformance::bad_plan_touches_nothing(kFactory); } \
  TEST_CASE("nothing lands after a cancel") { conformance::nothing_lands_after_cancel(kFactory); }           \
  TEST_CASE("nothing touches a deregistered region") { conformance::deregistered_is_untouched(kFactory); }   \
  TEST_CASE("connect is bounded and refuses nonsense") { conformance::connect_is_bounded(kFactory); }
