// The clauses of the conformance suite about what goes wrong: lost peers, bad plans, cancel.
// Included by conformance.hpp only.
#pragma once

#include "conformance_link.hpp"

namespace conformance {

// Clause 6. `a` sends to `b` and `c` at once, `b` goes away: its batches complete kPeerLost, once; `c` sees nothing.
inline void lost_peer_is_lost_alone(const Factory& make) {
  for (int round = 0; round < 5; ++round) {
    CAPTURE(round);
    Limits limits;
    limits.chunk_bytes = 64 << 10;
    limits.device_chunk_bytes = 64 << 10;
    Batches to_b, to_c;
    End a(make, limits), c(make, limits);
    auto b = std::make_unique<End>(make, limits);
    Memory& src = a.add(1, 4 << 20);
    Memory& dst_b = b->add(2, 12 << 20);
    Memory& dst_c = c.add(3, 12 << 20);
    auto with_b = std::make_unique<Pair>(a, *b, 2, 1);
    Pair with_c(a, c, 3, 1);
    for (BatchId id = 1; id <= 3; ++id) {
      to_b.push_back(std::make_unique<Batch>(*with_b->ab, id, plan_of(part_copy(src, dst_b, 4096, id - 1, 3)), id));
      to_c.push_back(std::make_unique<Batch>(*with_c.ab, id + 10, plan_of(part_copy(src, dst_c, 4096, id - 1, 3)), id));
    }
    for (auto& batch : to_c) expect_plan(batch->plan, a.memories, c.memories);
    // The first batch is finished off (all but its arrival), the second is under way, the third has not begun.
    for (int i = 0; i < 20 * round; ++i)
      for (size_t k = 0; k < 2; ++k) {
        to_b[k]->step();
        to_c[k]->step();
      }
    with_b->ba.reset();
    b->transport.reset();
    REQUIRE(with_c.poll_until([&] {
      // As the engine does: a batch whose kSent was polled is not touched again.
      for (auto* batches : {&to_b, &to_c})
        for (auto& batch : *batches)
          if (a.find_sent(batch->id) == nullptr) batch->step();
      bool all = !with_b->ab->lost().ok();
      for (BatchId id = 1; id <= 3; ++id) all = all && a.find_sent(id) != nullptr && a.find_sent(id + 10) != nullptr;
      return all && c.arrived.size() == 3;
    }));
    with_c.poll_for(std::chrono::milliseconds(20));
    CHECK(a.sent.size() == 6);
    CHECK(with_b->ab->lost().code == Code::kPeerLost);
    CHECK(with_c.ab->lost().ok());
    CHECK(a.find_sent(3)->status.code == Code::kPeerLost);
    for (const Completion& s : a.sent) {
      CHECK(s.peer == (s.batch > 10 ? 3 : 2));
      if (s.batch > 10) CHECK_MESSAGE(s.status.ok(), s.status.to_string());
      if (s.batch <= 10 && !s.status.ok()) CHECK(s.status.code == Code::kPeerLost);
    }
    CHECK(c.memory_as_expected());
    CHECK_FALSE(with_b->ab->describe().empty());
    Batch late(*with_b->ab, 99, plan_of(whole_copy(src, dst_c, 4096)), 99);
    late.step();
    REQUIRE(with_c.poll_until([&] { return a.find_sent(99) != nullptr; }));
    CHECK(a.find_sent(99)->status.code == Code::kPeerLost);
  }
}

// Clause 7, at the sender: each of these plans is wrong in one way. The link survives them all.
inline void bad_plan_touches_nothing(const Factory& make) {
  Limits limits;
  limits.chunk_bytes = 64 << 10;
  limits.device_chunk_bytes = 64 << 10;
  Batches batches;
  End a(make, limits), b(make, limits);
  Memory& src = a.add(1, 1 << 20);
  Memory& dst = b.add(2, 1 << 20);
  Pair pair(a, b);
  const PagedCopy good = whole_copy(src, dst, 4096);
  std::vector<PagedCopy> bad(11, good);
  bad[0].pairs[0].src = 77;
  bad[1].pairs[0].dst = 77;
  bad[2].pairs[0].src_offset = 1;
  bad[3].pairs[0].dst_offset = 1;
  bad[4].runs[0].src_slot = 1;
  bad[5].runs[0].dst_slot = 0xffffffff;
  bad[6].pairs[0].dst_stride = UINT64_MAX / 4;
  bad[7].pairs[0].dst_offset = UINT64_MAX - 8;
  bad[8].pairs[0].slot_bytes = 0;
  bad[9].pairs[0].slot_bytes = 8192;
  bad[10].runs[0].count = 0;
  for (size_t i = 0; i < bad.size(); ++i) {
    bad[i].seal();
    batches.push_back(std::make_unique<Batch>(*pair.ab, i + 1, plan_of(bad[i]), i + 1));
  }
  PagedCopy unsealed = good;
  unsealed.runs.push_back({0xfffffff0, 0, 8});
  batches.push_back(std::make_unique<Batch>(*pair.ab, 50, plan_of(unsealed), 50));
  REQUIRE(run(pair, batches, a));
  pair.poll_for(std::chrono::milliseconds(20));
  CHECK(a.sent.size() == batches.size());
  for (const Completion& c : a.sent) {
    CAPTURE(c.batch);
    CHECK(c.status.code == Code::kInvalid);
  }
  for (const Completion& c : b.arrived) CHECK_FALSE(c.status.ok());
  CHECK(b.memory_as_expected());
  Cursor cursor;
  TransferPlan plan = plan_of(good);
  CHECK(pair.ab->submit(60, plan, 5, cursor).code == Code::kInvalid);
  REQUIRE(pair.poll_until([&] { return a.find_sent(60) != nullptr; }));
  // A good copy first, a bad one after it: the batch fails as one.
  PagedCopy bad_index = good;
  bad_index.runs[0].src_slot = 1;
  bad_index.seal();
  batches.clear();
  batches.push_back(std::make_unique<Batch>(*pair.ab, 61, plan_of(good), 61));
  batches[0]->plan.copies.push_back(bad_index);
  REQUIRE(run(pair, batches, a));
  CHECK(a.find_sent(61)->status.code == Code::kInvalid);
  dst.expect_present();
  Batches fine;
  fine.push_back(std::make_unique<Batch>(*pair.ab, 70, plan_of(good), 70));
  expect_plan(fine[0]->plan, a.memories, b.memories);
  REQUIRE(run(pair, fine, a));
  CHECK(a.find_sent(70)->status.ok());
  CHECK(b.memory_as_expected());
}

// Clause 8. The destination is watched from the moment kSent(kCancelled) was polled.
inline void nothing_lands_after_cancel(const Factory& make) {
  Limits limits;
  limits.chunk_bytes = 64 << 10;
  limits.device_chunk_bytes = 64 << 10;
  limits.io_threads = 2;
  Batches batches;
  End a(make, limits), b(make, limits);
  Memory& src = a.add(1, 4 << 20);
  Memory& dst = b.add(2, 4 << 20);
  Pair pair(a, b);
  for (BatchId id = 1; id <= 25; ++id) {
    CAPTURE(id);
    batches.push_back(std::make_unique<Batch>(*pair.ab, id, plan_of(whole_copy(src, dst, 1024)), id));
    for (BatchId turn = 0; turn < 2 * (id - 1); ++turn)
      if (!batches.back()->step()) pair.poll();
    const bool notified = batches.back()->notified;
    pair.ab->cancel(id);
    pair.ab->cancel(id);
    REQUIRE(pair.poll_until([&] { return a.find_sent(id) != nullptr; }));
    const Code code = a.find_sent(id)->status.code;
    CHECK((code == Code::kCancelled || (notified && code == Code::kOk)));
    dst.fill(static_cast<std::byte>(id));
    pair.poll_for(std::chrono::milliseconds(2));
    CHECK(b.memory_as_expected());
    if (code == Code::kCancelled) CHECK(b.find_arrived(id) == nullptr);
  }
  CHECK(a.sent.size() == 25);
  Batches fine;
  fine.push_back(std::make_unique<Batch>(*pair.ab, 70, plan_of(whole_copy(src, dst, 1024)), 70));
  expect_plan(fine[0]->plan, a.memories, b.memories);
  REQUIRE(run(pair, fine, a));
  CHECK(a.find_sent(70)->status.ok());
  CHECK(b.memory_as_expected());
}

}  // namespace conformance
