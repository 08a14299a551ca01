// The clauses of the seam on cuda_ipc over the fake driver, whose streams run late and whose kernels are the real ones.
#include "fake_cuda_memory.hpp"
#include "transport/cuda_ipc/cuda_ipc_transport.hpp"

PDXFER_CONFORMANCE([](pdxfer::transport::Context c) { return pdxfer::transport::make_cuda_ipc(std::move(c)); })

static const bool kInstalled = conformance::use_fake_cuda();

namespace conformance {

TEST_CASE("what arrived and was handed on is acknowledged, also when its receiver closes at once") {
  for (BatchId round = 1; round <= 60; ++round) {
    CAPTURE(round);
    Batches batches;
    End a(kFactory), b(kFactory);
    Memory& src = a.add(1, 64 << 10);
    Memory& dst = b.add(2, 64 << 10);
    Pair pair(a, b);
    batches.push_back(std::make_unique<Batch>(*pair.ab, round, plan_of(whole_copy(src, dst, 1024)), round));
    const auto deadline = Clock::now() + kPatience;
    // As a worker that spins: nothing sleeps between two looks, so that it is one of these that reads the END.
    while (b.arrived.empty() && Clock::now() < deadline) {
      if (!batches[0]->step()) a.poll();
      b.poll();
    }
    REQUIRE(b.arrived.size() == 1);
    pair.ba.reset();
    REQUIRE(pair.poll_until([&] { return a.find_sent(round) != nullptr; }));
    CHECK_MESSAGE(a.find_sent(round)->status.ok(), a.find_sent(round)->status.to_string());
  }
}

TEST_CASE("a large piece that has the link for itself is timed, a small one is not") {
  for (const bool large : {false, true}) {
    CAPTURE(large);
    Batches batches;
    End a(kFactory), b(kFactory);
    const uint64_t bytes = large ? 16 << 20 : 15 << 20;
    Memory& src = a.add(1, bytes);
    Memory& dst = b.add(2, bytes);
    Pair pair(a, b);
    batches.push_back(std::make_unique<Batch>(*pair.ab, 1, plan_of(whole_copy(src, dst, 64 << 10)), 7));
    REQUIRE(pair.poll_until([&] { return batches[0]->step(), a.find_sent(1) != nullptr; }));
    CHECK(a.find_sent(1)->status.ok());
    CHECK((pair.ab->describe().find(" GB/s by ") != std::string::npos) == large);
  }
}

}  // namespace conformance
