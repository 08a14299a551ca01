// The clauses of the seam on cuda_ipc where some regions are a GPU's memory and some the host's, within one copy:
// copies of device memory alone are mapped, the others staged, over one link. Then batches of which both ways have a
// part.
#include "fake_cuda_memory.hpp"
#include "transport/cuda_ipc/cuda_ipc_transport.hpp"

PDXFER_CONFORMANCE([](pdxfer::transport::Context c) {
  static std::byte* const spare = fake_cuda::allocate(0, 4096);  // an end serves the device of its first region
  c.limits.staging_bytes = 1 << 20;
  static unsigned ends = 0;  // two by two: what is mapped has checksums or not
  if (ends++ / 2 % 2 == 1) c.cuda = "checksum=on";
  auto made = pdxfer::transport::make_cuda_ipc(std::move(c));
  made->register_memory({9999, {spare, 4096, 0}});
  return made;
})

static const bool kInstalled = [] {
  conformance::memory_kind_of = [](pdxfer::RegionId id) {
    return id % 2 == 1 ? conformance::fake_device_memory() : conformance::MemoryKind{};
  };
  return conformance::use_fake_cuda();
}();

namespace conformance {
namespace {

// Pages of device memory and rows of host memory in one batch, as a server's request has them.
TransferPlan both_ways(Memory& pages, Memory& rows, Memory& to_pages, Memory& to_rows, uint64_t part, uint64_t parts) {
  TransferPlan plan;
  plan.copies.push_back(part_copy(pages, to_pages, 1024, part, parts));
  plan.copies.push_back(part_copy(rows, to_rows, 256, part, parts));
  if (part % 2 == 1) std::swap(plan.copies[0], plan.copies[1]);
  return plan;
}

}  // namespace

TEST_CASE("a batch of which both ways have a part completes once, and arrives when all of it is there") {
  End a(kFactory, small_chunks()), b(kFactory, small_chunks());
  Memory& pages = a.add(1, 1 << 20);
  Memory& rows = a.add(2, 1 << 20);
  Memory& to_pages = b.add(3, 20 << 20);
  Memory& to_rows = b.add(4, 5 << 20);
  Batches batches;
  Pair pair(a, b);
  Random random(3);
  for (BatchId id = 1; id <= 40; ++id) {
    batches.push_back(std::make_unique<Batch>(*pair.ab, id, both_ways(pages, rows, to_pages, to_rows, id - 1, 40), id,
                                              random_bytes(random, id * 7)));
    expect_plan(batches.back()->plan, a.memories, b.memories);
  }
  REQUIRE(run(pair, batches, a));
  REQUIRE(pair.poll_until([&] { return b.arrived.size() == 40; }));
  pair.poll_for(std::chrono::milliseconds(20));
  CHECK(a.sent.size() == 40);
  CHECK(b.arrived.size() == 40);
  for (const auto& batch : batches) {
    CHECK(a.find_sent(batch->id)->status.ok());
    CHECK(b.find_arrived(batch->id)->tail == batch->tail);
  }
  CHECK(b.memory_as_expected());
  CHECK(pair.ab->describe().find("mapped: 1 regions") != std::string::npos);
  CHECK(pair.ab->describe().find("host memory through a socket: 1 regions") != std::string::npos);
}

TEST_CASE("nothing of either way lands after a cancel") {
  End a(kFactory, small_chunks()), b(kFactory, small_chunks());
  Memory& pages = a.add(1, 2 << 20);
  Memory& rows = a.add(2, 2 << 20);
  Memory& to_pages = b.add(3, 2 << 20);
  Memory& to_rows = b.add(4, 2 << 20);
  Batches batches;
  Pair pair(a, b);
  for (BatchId id = 1; id <= 24; ++id) {
    CAPTURE(id);
    batches.push_back(std::make_unique<Batch>(*pair.ab, id, both_ways(pages, rows, to_pages, to_rows, 0, 1), id));
    if (id % 2 == 0) std::swap(batches.back()->plan.copies[0], batches.back()->plan.copies[1]);
    for (BatchId turn = 0; turn < 6 * id && a.find_sent(id) == nullptr; ++turn)
      if (!batches.back()->step()) pair.poll();
    for (int i = 0; i < 2; ++i)  // one that completed is not touched again
      if (a.find_sent(id) == nullptr) pair.ab->cancel(id);
    REQUIRE(pair.poll_until([&] { return a.find_sent(id) != nullptr; }));
    const Code code = a.find_sent(id)->status.code;
    CHECK((code == Code::kCancelled || (batches.back()->notified && code == Code::kOk)));
    to_pages.fill(static_cast<std::byte>(id));
    to_rows.fill(static_cast<std::byte>(id));
    pair.poll_for(std::chrono::milliseconds(2));
    CHECK(b.memory_as_expected());
    if (code == Code::kCancelled) CHECK(b.find_arrived(id) == nullptr);
  }
  CHECK(a.sent.size() == 24);
}

TEST_CASE("a lost peer ends both ways of a batch, once") {
  for (uint64_t turns : {0, 3, 30, 90}) {
    CAPTURE(turns);
    Batches batches;
    End a(kFactory, small_chunks());
    auto b = std::make_unique<End>(kFactory, small_chunks());
    Memory& pages = a.add(1, 2 << 20);
    Memory& rows = a.add(2, 2 << 20);
    Memory& to_pages = b->add(3, 4 << 20);
    Memory& to_rows = b->add(4, 4 << 20);
    Pair pair(a, *b);
    for (BatchId id = 1; id <= 2; ++id)
      batches.push_back(
          std::make_unique<Batch>(*pair.ab, id, both_ways(pages, rows, to_pages, to_rows, id - 1, 2), id));
    for (uint64_t i = 0; i < turns; ++i)
      for (const auto& batch : batches)
        if (a.find_sent(batch->id) == nullptr) batch->step();
    pair.ba.reset();
    b->transport.reset();
    const auto deadline = Clock::now() + kPatience;
    while (a.sent.size() < 2 && Clock::now() < deadline) {
      for (const auto& batch : batches)
        if (a.find_sent(batch->id) == nullptr) batch->step();
      a.poll();
    }
    REQUIRE(a.sent.size() == 2);
    for (int i = 0; i < 50; ++i) a.poll();
    CHECK(a.sent.size() == 2);
    for (const Completion& c : a.sent) CHECK_MESSAGE(c.status.code == Code::kPeerLost, c.status.to_string());
    CHECK(pair.ab->lost().code == Code::kPeerLost);
  }
}

}  // namespace conformance
