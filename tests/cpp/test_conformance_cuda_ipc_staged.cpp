// The clauses of the seam on cuda_ipc where nothing is mapped: all of it goes through the slots of a shared pinned
// ring.
#include "fake_cuda_memory.hpp"
#include "transport/cuda_ipc/cuda_ipc_transport.hpp"

PDXFER_CONFORMANCE([](pdxfer::transport::Context c) {
  c.cuda = "path=staging";
  c.limits.staging_bytes = 1 << 20;  // so that slots run out
  return pdxfer::transport::make_cuda_ipc(std::move(c));
})

static const bool kInstalled = conformance::use_fake_cuda();

namespace conformance {

TEST_CASE("a launch that fails, at either end, is typed and the link goes on") {
  for (const uint64_t turns : {0, 5}) {
    CAPTURE(turns);
    Batches batches;
    End a(kFactory, small_chunks()), b(kFactory, small_chunks());
    Memory& src = a.add(1, 1 << 20);
    Memory& dst = b.add(3, 4 << 20);
    Pair pair(a, b);
    for (BatchId id = 1; id <= 4; ++id)
      batches.push_back(std::make_unique<Batch>(*pair.ab, id, plan_of(part_copy(src, dst, 1024, id - 1, 4)), id));
    for (uint64_t i = 0; i < turns; ++i)
      if (!batches[0]->step()) pair.poll();
    fake_cuda::fail_next_launch(700);
    REQUIRE(run(pair, batches, a));
    fake_cuda::fail_next_launch(0);
    pair.poll_for(std::chrono::milliseconds(20));
    CHECK(a.sent.size() == 4);
    size_t failed = 0;
    for (const Completion& c : a.sent) {
      failed += !c.status.ok();
      if (!c.status.ok()) CHECK_MESSAGE(c.status.code == Code::kInternal, c.status.to_string());
    }
    CHECK(failed > 0);
    CHECK(pair.ab->lost().ok());
  }
}

TEST_CASE("staging memory that cannot be page-locked is a typed error that says what to do; nothing is pinned before") {
  static std::atomic<int> pins{0}, refusals{0};
  pins = 0;
  const transport::HostPin before = pin;
  pin = [](int, std::byte*, uint64_t) -> std::shared_ptr<void> {
    ++pins;
    if (refusals > 0) throw Error(Code::kUnavailable, "cuMemHostRegister: CUDA_ERROR_OUT_OF_MEMORY", 2);
    return std::make_shared<int>(0);
  };
  {
    Batches batches;
    End a(kFactory, small_chunks()), b(kFactory, small_chunks());
    Memory& src = a.add(1, 1 << 20);
    Memory& dst = b.add(3, 1 << 20);
    Pair pair(a, b);
    CHECK(pins == 0);
    refusals = 1;
    batches.push_back(std::make_unique<Batch>(*pair.ab, 1, plan_of(whole_copy(src, dst, 1024)), 1));
    REQUIRE(run(pair, batches, a));
    CHECK(a.find_sent(1)->status.code == Code::kUnavailable);
    CHECK(a.find_sent(1)->status.native == 2);
    CHECK(pair.ab->describe().find("lower staging_bytes") != std::string::npos);
    CHECK(pair.ab->describe().find("CUDA_ERROR_OUT_OF_MEMORY") != std::string::npos);
    refusals = 0;  // there is room now: the next batch tries again
    batches.push_back(std::make_unique<Batch>(*pair.ab, 2, plan_of(whole_copy(src, dst, 1024)), 2));
    expect_plan(batches[1]->plan, a.memories, b.memories);
    REQUIRE(pair.poll_until([&] {
      if (a.find_sent(2) == nullptr) batches[1]->step();
      return a.find_sent(2) != nullptr;
    }));
    CHECK_MESSAGE(a.find_sent(2)->status.ok(), a.find_sent(2)->status.to_string());
    CHECK(dst.as_expected());
    CHECK(pins == 3);  // one that failed, and one at each end
  }
  pin = before;
}

}  // namespace conformance
