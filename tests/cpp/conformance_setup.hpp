// The promises of set-up in the conformance suite: deregister_memory fences, connect is bounded, nonsense is refused.
// Included by conformance.hpp only.
#pragma once

#include "conformance_link.hpp"

namespace conformance {

// register_memory's promise: after deregister_memory returned, at either end, nothing of the transport touches it.
inline void deregistered_is_untouched(const Factory& make) {
  for (int round = 0; round < 8; ++round) {
    CAPTURE(round);
    const bool at_receiver = round % 2 == 0;
    Limits limits;
    limits.chunk_bytes = 64 << 10;
    limits.device_chunk_bytes = 64 << 10;
    limits.io_threads = 2;
    Batches batches;
    End a(make, limits), b(make, limits);
    Memory& src = a.add(1, 4 << 20);
    Memory& dst = b.add(2, 4 << 20);
    Pair pair(a, b);
    batches.push_back(std::make_unique<Batch>(*pair.ab, 1, plan_of(whole_copy(src, dst, 1024)), 1));
    for (int turn = 0; turn < 6 * round; ++turn)
      if (!batches[0]->step()) pair.poll();
    std::atomic<bool> stop{false};
    std::thread polling([&] {
      while (!stop) pair.poll();
    });
    (at_receiver ? b : a).transport->deregister_memory(at_receiver ? 2 : 1);
    stop = true;
    polling.join();
    if (at_receiver) {
      pair.ab->forget_region(2);
      dst.fill(std::byte{42});
    } else {
      src.fill(std::byte{42});
    }
    REQUIRE(run(pair, batches, a));
    pair.poll_for(std::chrono::milliseconds(2));
    CHECK_MESSAGE(a.find_sent(1)->status.code == Code::kInvalid, a.find_sent(1)->status.to_string());
    if (at_receiver) CHECK(b.memory_as_expected());
    for (const Completion& c : b.arrived) CHECK_FALSE(c.status.ok());
    CHECK_THROWS_AS((at_receiver ? b : a).transport->deregister_memory(at_receiver ? 2 : 1), Error);
    Memory& fresh_src = a.add(11, 64 << 10);
    Memory& fresh_dst = b.add(12, 64 << 10);
    pair.ab->import_region(fresh_dst.region(), b.keys.back());
    Batches fine;
    fine.push_back(std::make_unique<Batch>(*pair.ab, 70, plan_of(whole_copy(fresh_src, fresh_dst, 1024)), 70));
    expect_plan(fine[0]->plan, a.memories, b.memories);
    REQUIRE(run(pair, fine, a));
    CHECK(a.find_sent(70)->status.ok());
    CHECK(fresh_dst.as_expected());
  }
}

// connect gives up at its deadline, and neither it nor register_memory accepts nonsense.
inline void connect_is_bounded(const Factory& make) {
  End a(make), b(make);
  Link link;
  link.peer = 9;
  link.role = Role::kAccept;
  link.address = b.transport->address();
  link.token[3] = 42;
  link.deadline = Clock::now() + std::chrono::milliseconds(150);
  const auto start = Clock::now();
  CHECK_THROWS_AS(a.transport->connect(link), Error);
  CHECK(Clock::now() - start < std::chrono::seconds(2));
  for (size_t n : {size_t{0}, size_t{1}, size_t{300}}) {
    link.role = Role::kConnect;
    link.address = Bytes(n, std::byte{0xee});
    link.deadline = Clock::now() + std::chrono::milliseconds(150);
    CHECK_THROWS_AS(a.transport->connect(link), Error);
  }
  CHECK(a.transport->address().size() <= 4096);
  Memory memory(1, 16, 1);
  std::byte* const some = memory.data();
  CHECK_THROWS_AS(a.transport->register_memory({1, {nullptr, 16, memory_kind.device}}), Error);
  CHECK_THROWS_AS(a.transport->register_memory({1, {some, 0, memory_kind.device}}), Error);
  CHECK_THROWS_AS(a.transport->register_memory({kNoId, {some, 16, memory_kind.device}}), Error);
  CHECK_THROWS_AS(a.transport->deregister_memory(1), Error);
  CHECK(a.transport->register_memory({1, {some, 16, memory_kind.device}}).size() <= 65536);
  CHECK_THROWS_AS(a.transport->register_memory({1, {some, 16, memory_kind.device}}), Error);
  a.transport->deregister_memory(1);
}

}  // namespace conformance
