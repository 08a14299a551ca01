// The clauses of the seam on cuda_ipc over the fake driver, whose streams run late and whose kernels are the real ones.
#include "fake_cuda_memory.hpp"
#include "passing_device_copy.hpp"
#include "transport/cuda_ipc/cuda_ipc_transport.hpp"

PDXFER_CONFORMANCE([](pdxfer::transport::Context c) { return pdxfer::transport::make_cuda_ipc(std::move(c)); })

static const bool kInstalled = conformance::use_fake_cuda();

namespace {

// A device that breaks with a piece under way, once told to.
struct Breaking final : conformance::PassingDeviceCopy {
  using PassingDeviceCopy::PassingDeviceCopy;
  pdxfer::Status done(pdxfer::DeviceTicket ticket, bool& over) noexcept override {
    if (broken) return {pdxfer::Code::kInternal, 700, "cuEventQuery"};
    return inner->done(ticket, over);
  }
  static inline std::atomic<bool> broken{false};
};

// The progress that it tells stays where it is, as while a model has the device.
struct Late {
  Late() { fake_cuda::set_delay_us(60000); }
  ~Late() { fake_cuda::set_delay_us(100); }
};

}  // namespace

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

// Batch 1 up to its end, which is sent while its piece waits for the device.
static void send_ahead(Pair& pair, Batches& batches, Memory& src, Memory& dst) {
  batches.push_back(std::make_unique<Batch>(*pair.ab, 1, plan_of(whole_copy(src, dst, 1024)), 1));
  while (batches[0]->step()) {
  }
  REQUIRE(batches[0]->notified);
}

TEST_CASE("an end that was sent ahead of its bytes can be taken back until they are there") {
  Batches batches;
  End a(kFactory), b(kFactory);
  Memory& src = a.add(1, 64 << 10);
  Memory& dst = b.add(2, 64 << 10);
  Pair pair(a, b);
  {
    const Late late;
    send_ahead(pair, batches, src, dst);
    pair.poll_for(std::chrono::milliseconds(2));
    CHECK(b.arrived.empty());
    pair.ab->cancel(1);
    pair.ab->cancel(1);
    REQUIRE(pair.poll_until([&] { return a.find_sent(1) != nullptr; }));
  }
  CHECK(a.find_sent(1)->status.code == Code::kCancelled);
  dst.fill(std::byte{7});  // nothing lands any more
  pair.poll_for(std::chrono::milliseconds(100));
  CHECK(b.memory_as_expected());
  CHECK(b.arrived.empty());
  CHECK(a.sent.size() == 1);
}

TEST_CASE("a receiver that no longer looks, or never could, is told by a message") {
  for (const bool refused : {false, true}) {
    CAPTURE(refused);
    fake_cuda::refuse_progress(refused);
    Batches batches;
    End a(kFactory), b(kFactory);
    const uint64_t bytes = refused ? 16 << 20 : 64 << 10;  // the driver tells what the copy engine moves
    Memory& src = a.add(1, bytes);
    Memory& dst = b.add(2, bytes);
    Pair pair(a, b);
    {
      const Late late;
      batches.push_back(std::make_unique<Batch>(*pair.ab, 1, plan_of(whole_copy(src, dst, 64 << 10)), 1));
      expect_plan(batches[0]->plan, a.memories, b.memories);
      const auto deadline = Clock::now() + kPatience;
      // Only the sender is polled; the receiver's own thread hears of it and wakes its worker.
      const int before = b.wakes->load();
      b.poll();
      while (a.find_sent(1) == nullptr && Clock::now() < deadline)
        if (!batches[0]->step()) a.poll();
      REQUIRE(a.find_sent(1) != nullptr);
      CHECK(b.wakes->load() > before);
    }
    CHECK(a.find_sent(1)->status.ok());
    b.poll();
    REQUIRE(b.arrived.size() == 1);
    CHECK(b.memory_as_expected());
    CHECK((pair.ab->describe().find("arrivals told by messages alone") != std::string::npos) == refused);
  }
  fake_cuda::refuse_progress(false);
}

TEST_CASE("a receiver whose worker does not come to it is sent more ends than may wait for their bytes") {
  constexpr BatchId kBatches = 300;
  Batches batches;
  End a(kFactory), b(kFactory);
  Memory& src = a.add(1, 64 << 10);
  Memory& dst = b.add(2, 64 << 10);
  Pair pair(a, b);
  const auto deadline = Clock::now() + 2 * kPatience;
  for (BatchId id = 1; id <= kBatches; ++id) {
    batches.push_back(std::make_unique<Batch>(*pair.ab, id, plan_of(whole_copy(src, dst, 1024)), id));
    while (!batches.back()->notified && Clock::now() < deadline)
      if (!batches.back()->step()) a.poll();
  }
  while (a.sent.size() < kBatches && Clock::now() < deadline) a.poll();
  CHECK(a.sent.size() == kBatches);
  for (const Completion& sent : a.sent) CHECK_MESSAGE(sent.status.ok(), sent.status.to_string());
  REQUIRE(pair.poll_until([&] { return b.arrived.size() == kBatches; }));
  for (BatchId id = 1; id <= kBatches; ++id) CHECK(b.arrived[id - 1].tag == id);
}

TEST_CASE("a device that breaks behind an end sent ahead: no arrival, and the batch says why") {
  const Factory breaking = [](Context c) {
    c.device_copy = [inner = c.device_copy](int ordinal, const DeviceCopyOptions& options) {
      return std::make_unique<Breaking>(inner(ordinal, options));
    };
    return kFactory(std::move(c));
  };
  Batches batches;
  End a(breaking), b(kFactory);
  Memory& src = a.add(1, 64 << 10);
  Memory& dst = b.add(2, 64 << 10);
  Pair pair(a, b);
  {
    const Late late;
    send_ahead(pair, batches, src, dst);
    b.poll();
    Breaking::broken = true;
    REQUIRE(pair.poll_until([&] { return a.find_sent(1) != nullptr; }));
    Breaking::broken = false;
    CHECK(a.find_sent(1)->status.native == 700);
    pair.poll_for(std::chrono::milliseconds(150));  // the fake's piece is in place by now; nobody waits for it
  }
  CHECK(b.arrived.empty());
  CHECK(a.sent.size() == 1);
  CHECK(pair.ab->lost().ok());
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
    // The acknowledgement may be here before this end looked at its own device.
    const auto timed = [&] { return pair.ab->describe().find(" GB/s by ") != std::string::npos; };
    CHECK(pair.poll_until(timed, std::chrono::milliseconds(large ? 8000 : 50)) == large);
  }
}

}  // namespace conformance
