// The receiving end of checksums alone: what a peer may say of a batch, in what order, and what becomes of the rest.
#include <doctest/doctest.h>

#include <cstring>
#include <thread>

#include "fake/fake_cuda.hpp"
#include "pack/device_copier.hpp"
#include "transport/cuda_ipc/cuda_ipc_link.hpp"
#include "transport/stream/frame.hpp"

namespace pdxfer::transport::cuda_ipc {
namespace {

constexpr RegionId kRegion = 3;
constexpr uint64_t kPages = 64, kBytes = kPages << 10;

Header message(Type type, BatchId batch, uint64_t tag = 0, uint32_t copy = 0) {
  Header header;
  header.type = type;
  header.batch = batch;
  header.tag = tag;
  header.region = copy;
  return header;
}

// Pages of 1 KiB of the region, in reverse.
PagedCopy reversed() {
  PagedCopy copy;
  copy.pairs = {{kRegion, kRegion, 0, 0, 1024, 1024, 1024}};
  for (uint32_t i = 0; i < kPages; ++i) copy.runs.push_back({i, static_cast<uint32_t>(kPages) - 1 - i, 1});
  copy.seal();
  return copy;
}

struct Bench {
  Bench() : core((fake_cuda::install(), Context())), memory(fake_cuda::allocate(0, kBytes)) {
    for (uint64_t i = 0; i < kBytes; ++i) memory[i] = static_cast<std::byte>(i * 31 >> 2);
    core.regions[kRegion].buffer = {memory, kBytes, 0};
    verifier.emplace(core, copier());
  }
  ~Bench() {
    verifier.reset();
    fake_cuda::release(memory);
  }

  static std::unique_ptr<DeviceCopy> copier() {
    DeviceCopyOptions options;
    options.checksum = true;
    return std::make_unique<pack::DeviceCopier>(0, options);
  }
  Status plan(BatchId batch, const PagedCopy& copy, uint32_t index = 0) {
    const uint64_t counts = copy.pairs.size() | copy.runs.size() << 32;
    return verifier->plan(message(Type::kPlan, batch, counts, index), encode_destination(copy));
  }
  // What the sender would tell: by a copier of its own.
  uint64_t sum_of(const PagedCopy& copy) const {
    const auto device = copier();
    const uint64_t base = reinterpret_cast<uint64_t>(memory);
    DeviceTables tables = 0;
    DeviceTicket ticket = 0;
    Cursor cursor;
    REQUIRE(device->prepare(copy, DeviceForm::kSum, {}, {&base, 1}, tables).ok());
    REQUIRE(device->launch(tables, copy, cursor, UINT64_MAX, 0, ticket).ok());
    for (bool over = false; !over;) REQUIRE(device->done(ticket, over).ok());
    return device->sum(ticket);
  }
  // The verdict on the next batch that is over.
  Status verdict(BatchId batch) {
    for (int i = 0; i < 10000; ++i) {
      const auto verdicts = verifier->settle();
      if (!verdicts.empty()) {
        REQUIRE(verdicts.size() == 1);
        CHECK(verdicts[0].end.batch == batch);
        CHECK(verdicts[0].tail.size() == 2);
        CHECK_FALSE(verifier->holds(batch));
        return verdicts[0].status;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    FAIL("no verdict");
    return kOkStatus;
  }
  void end(BatchId batch) { verifier->end(message(Type::kEnd, batch), Bytes(2)); }

  Core core;
  std::byte* memory;
  std::optional<Verifier> verifier;
};

bool lost(const Status& status) { return status.code == Code::kPeerLost; }

}  // namespace

TEST_CASE("the right sum is ok, any other is corrupted, whatever was told before") {
  Bench bench;
  const PagedCopy copy = reversed();
  const uint64_t sum = bench.sum_of(copy);
  for (BatchId id = 1; id <= 4; ++id) {
    CAPTURE(id);
    const bool right = id % 2 == 1;
    REQUIRE(bench.plan(id, copy).ok());
    CHECK(bench.verifier->holds(id));
    if (id > 2) {
      REQUIRE(bench.verifier->landed(message(Type::kLanded, id, 3000)).ok());
      REQUIRE(bench.verifier->landed(message(Type::kLanded, id, 1000)).ok());
    }
    REQUIRE(bench.verifier->sum(message(Type::kSum, id, right ? sum : sum ^ 1)).ok());
    bench.end(id);
    CHECK(bench.verdict(id).code == (right ? Code::kOk : Code::kCorrupt));
  }
  CHECK_FALSE(bench.verifier->busy());
}

TEST_CASE("copies do not stand for one another") {
  Bench bench;
  PagedCopy first = reversed(), second = reversed();
  first.runs.resize(8);
  first.seal();
  second.runs.erase(second.runs.begin(), second.runs.begin() + 8);
  second.seal();
  const uint64_t sums[] = {bench.sum_of(first), bench.sum_of(second)};
  for (const bool swapped : {false, true}) {
    const BatchId id = swapped ? 2 : 1;
    REQUIRE(bench.plan(id, first, 0).ok());
    REQUIRE(bench.plan(id, second, 5).ok());
    const uint64_t sum = weighted(0, sums[swapped]) + weighted(5, sums[!swapped]);
    REQUIRE(bench.verifier->sum(message(Type::kSum, id, sum)).ok());
    bench.end(id);
    CHECK(bench.verdict(id).code == (swapped ? Code::kCorrupt : Code::kOk));
  }
}

TEST_CASE("a destination that is not ours, or no longer, is invalid and not read") {
  Bench bench;
  PagedCopy outside = reversed();
  outside.runs.back().dst_slot = kPages;
  outside.seal();
  PagedCopy unknown = reversed();
  unknown.pairs[0].dst = kRegion + 1;
  PagedCopy empty_run = reversed();
  empty_run.runs[3].count = 0;
  BatchId id = 100;
  Bytes reserved = encode_destination(reversed());  // the word after the first pair's region
  reserved[sizeof(RegionId)] = std::byte{1};
  const uint64_t counts = 1 | kPages << 32;
  REQUIRE(bench.verifier->plan(message(Type::kPlan, id, counts), reserved).ok());
  REQUIRE(bench.verifier->sum(message(Type::kSum, id, 0)).ok());
  bench.end(id);
  CHECK(bench.verdict(id).code == Code::kInvalid);
  for (const PagedCopy& copy : {outside, unknown, empty_run}) {
    REQUIRE(bench.plan(++id, copy).ok());
    REQUIRE(bench.verifier->landed(message(Type::kLanded, id, 1024)).ok());
    REQUIRE(bench.verifier->sum(message(Type::kSum, id, 0)).ok());
    bench.end(id);
    CHECK(bench.verdict(id).code == Code::kInvalid);
  }
  // Deregistered between two pieces.
  REQUIRE(bench.plan(++id, reversed()).ok());
  REQUIRE(bench.verifier->landed(message(Type::kLanded, id, 4096)).ok());
  bench.core.regions.clear();
  bench.core.generation.fetch_add(1);
  while (!bench.verifier->over(bench.verifier->launched())) std::this_thread::yield();
  const DeviceTicket before = bench.verifier->launched();
  REQUIRE(bench.verifier->sum(message(Type::kSum, id, 0)).ok());
  bench.end(id);
  CHECK(bench.verdict(id).code == Code::kInvalid);
  CHECK(bench.verifier->launched() == before);
}

TEST_CASE("more bytes than the plan has, and an end without a sum, are invalid") {
  Bench bench;
  REQUIRE(bench.plan(1, reversed()).ok());
  REQUIRE(bench.verifier->landed(message(Type::kLanded, 1, kBytes + 1)).ok());
  bench.end(1);
  CHECK(bench.verdict(1).code == Code::kInvalid);
  REQUIRE(bench.plan(2, reversed()).ok());
  bench.end(2);
  CHECK(bench.verdict(2).code == Code::kInvalid);
}

TEST_CASE("a batch that its sender gives up is forgotten, also while it is read") {
  Bench bench;
  fake_cuda::set_delay_us(500);
  for (BatchId id = 1; id <= 200; ++id) {
    REQUIRE(bench.plan(id, reversed()).ok());
    REQUIRE(bench.verifier->landed(message(Type::kLanded, id, 2048)).ok());
    bench.verifier->give_up(id);
    CHECK_FALSE(bench.verifier->holds(id));
    CHECK(bench.verifier->settle().empty());
  }
  while (!bench.verifier->over(bench.verifier->launched())) std::this_thread::yield();
  CHECK_FALSE(bench.verifier->busy());
  fake_cuda::set_delay_us(0);
}

TEST_CASE("messages that are malformed or out of turn end the link") {
  const PagedCopy copy = reversed();
  const Bytes wire = encode_destination(copy);
  const uint64_t counts = copy.pairs.size() | copy.runs.size() << 32;
  const auto plan = [&](Bench& bench, uint64_t tag, ByteView body, uint32_t index = 0) {
    return bench.verifier->plan(message(Type::kPlan, 1, tag, index), body);
  };
  const ByteView half = ByteView(wire).first(100);
  Bench bench;
  CHECK(lost(plan(bench, 0, wire)));
  CHECK(lost(plan(bench, 1 | uint64_t{stream::kMaxRuns + 1} << 32, half)));
  CHECK(lost(plan(bench, (uint64_t{stream::kMaxPairs} + 1) | 1ull << 32, half)));
  CHECK(lost(plan(bench, counts, wire, stream::kMaxCopies)));
  CHECK(lost(bench.verifier->landed(message(Type::kLanded, 1, 1))));
  CHECK(lost(bench.verifier->sum(message(Type::kSum, 1, 1))));
  REQUIRE(plan(bench, counts, half).ok());
  CHECK(lost(bench.verifier->landed(message(Type::kLanded, 1, 1))));  // of half a plan
  CHECK(lost(bench.verifier->sum(message(Type::kSum, 1, 1))));

  Bench parts;
  REQUIRE(plan(parts, counts, half).ok());
  CHECK(lost(plan(parts, counts, {})));
  CHECK(lost(plan(parts, counts, wire)));  // more than is left
  CHECK(lost(plan(parts, counts + 1, ByteView(wire).subspan(100))));
  REQUIRE(plan(parts, counts, ByteView(wire).subspan(100)).ok());
  CHECK(lost(plan(parts, counts, wire)));                                       // twice
  REQUIRE(parts.verifier->landed(message(Type::kLanded, 1, UINT64_MAX)).ok());  // which fails the batch
  CHECK(lost(parts.verifier->landed(message(Type::kLanded, 1, UINT64_MAX))));
  REQUIRE(parts.verifier->sum(message(Type::kSum, 1, 1)).ok());
  CHECK(lost(parts.verifier->sum(message(Type::kSum, 1, 1))));
  CHECK(lost(parts.verifier->landed(message(Type::kLanded, 1, 1))));
  CHECK(lost(plan(parts, counts, wire, 1)));

  Bench crowded;  // plans that are announced and never come
  Status status;
  const uint64_t large = 1 | uint64_t{stream::kMaxRuns} << 32;
  for (BatchId id = 1; id <= 64 && status.ok(); ++id)
    status = crowded.verifier->plan(message(Type::kPlan, id, large), half);
  CHECK(lost(status));
}

}  // namespace pdxfer::transport::cuda_ipc
