// DeviceCopier over the fake driver: every form, random pieces, back-pressure, wake-ups and device errors.
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <random>
#include <thread>

#include "core/paged_copy.hpp"
#include "device_buffers.hpp"
#include "pack/device_selftest.hpp"

namespace pdxfer::pack {
namespace {

bool in_place(const PagedCopy& copy, const Buffers& memory) {
  for (Cursor at; !at_end(copy, at);) {
    const Extent e = next_extent(copy, at, UINT64_MAX);
    if (std::memcmp(memory.dst + e.dst_offset, memory.src + e.src_offset, e.bytes) != 0) return false;
  }
  return true;
}

// Moves the copy, whose regions both begin with the buffers, in pieces; how many copies of the engine that took.
unsigned engine_copies_of(DeviceCopier& copier, const PagedCopy& copy, const Buffers& memory, uint64_t piece) {
  const std::vector<uint64_t> src(copy.pairs.size(), reinterpret_cast<uint64_t>(memory.src));
  const std::vector<uint64_t> dst(copy.pairs.size(), reinterpret_cast<uint64_t>(memory.dst));
  DeviceTables tables = 0;
  REQUIRE(copier.prepare(copy, DeviceForm::kPaged, src, dst, tables).ok());
  const unsigned before = fake_cuda::engine_copies();
  DeviceTicket ticket = 0;
  for (Cursor cursor; !at_end(copy, cursor);) REQUIRE(copier.launch(tables, copy, cursor, piece, 0, ticket).ok());
  wait_for(copier, ticket);
  CHECK(in_place(copy, memory));
  copier.release(tables);
  return fake_cuda::engine_copies() - before;
}

}  // namespace

TEST_CASE("random copies in random pieces agree with the host's walk, paged and through a buffer") {
  fake_cuda::install();
  const SelfTestResult result = device_selftest(0, 20261124, 200);
  CHECK_MESSAGE(result.failure.empty(), result.failure);
  CHECK(result.cases == 200);
}

TEST_CASE("division by multiplication is exact for every word that a kernel counts") {
  for (const unsigned d : {1u, 2u, 3u, 7u, 64u, 72u, 73u, 1151u, 4608u, (1u << 30) + 1, (1u << 31) - 1}) {
    const Divisor by = divisor_of(d);
    for (uint64_t n :
         std::initializer_list<uint64_t>{0, uint64_t{d} - 1, d, uint64_t{d} + 1, 5ull * d - 1, (1ull << 31) - 1}) {
      if (n >= 1ull << 31) continue;
      CAPTURE(d);
      CAPTURE(n);
      const uint64_t quotient = (n * by.multiplier) >> (31 + by.shift);
      CHECK(quotient == n / d);
    }
  }
}

TEST_CASE("tables and pieces are bounded: no room is an answer, and room comes back") {
  fake_cuda::install();
  fake_cuda::set_delay_us(200);
  const PagedCopy copy = pages(1024, 64);
  Buffers memory(64 << 10);
  DeviceCopyOptions options;
  options.table_bytes = 4096;
  options.pieces = 4;
  DeviceCopier copier(0, options);
  const uint64_t src = reinterpret_cast<uint64_t>(memory.src), dst = reinterpret_cast<uint64_t>(memory.dst);
  std::vector<DeviceTables> held;
  for (int i = 0; i < 16; ++i) {
    DeviceTables tables = 0;
    REQUIRE(copier.prepare(copy, DeviceForm::kPaged, {&src, 1}, {&dst, 1}, tables).ok());
    if (tables == 0) break;
    held.push_back(tables);
  }
  CHECK(held.size() >= 2);
  CHECK(held.size() < 16);
  DeviceTicket last = 0;
  int full = 0;
  for (Cursor cursor; !at_end(copy, cursor);) {
    const Cursor before = cursor;
    DeviceTicket ticket = 0;
    REQUIRE(copier.launch(held[0], copy, cursor, 4096, 0, ticket).ok());
    if (ticket == 0) {
      CHECK(cursor == before);
      ++full;
      wait_for(copier, last - 2);
    } else {
      last = ticket;
    }
  }
  CHECK(full > 0);
  wait_for(copier, last);
  for (uint32_t i = 0; i < 64; ++i) CHECK(std::memcmp(memory.src + i * 1024, memory.dst + (63 - i) * 1024, 1024) == 0);
  for (const DeviceTables tables : held) copier.release(tables);
  DeviceTables again = 0;
  for (int i = 0; i < 1000 && again == 0; ++i) {
    REQUIRE(copier.prepare(copy, DeviceForm::kPaged, {&src, 1}, {&dst, 1}, again).ok());
    bool over = false;
    if (again == 0) REQUIRE(copier.done(last + 1, over).ok());
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
  CHECK(again != 0);
  CHECK(copier.prepare(pages(16, 4096), DeviceForm::kPaged, {&src, 1}, {&dst, 1}, again).code == Code::kInvalid);
  fake_cuda::set_delay_us(0);
}

TEST_CASE("each piece wakes its caller, and the copy engine takes long runs") {
  fake_cuda::install();
  PagedCopy copy;
  copy.pairs = {{1, 2, 0, 0, 1024, 1024, 1024}};
  copy.runs = {{0, 0, 20000}, {20500, 20500, 1}};
  copy.seal();
  Buffers memory(21 << 20);
  std::atomic<int> wakes{0};
  DeviceCopyOptions options;
  options.wake = [&] { ++wakes; };
  const uint64_t src = reinterpret_cast<uint64_t>(memory.src), dst = reinterpret_cast<uint64_t>(memory.dst);
  {
    DeviceCopier copier(0, options);
    DeviceTables tables = 0;
    REQUIRE(copier.prepare(copy, DeviceForm::kPaged, {&src, 1}, {&dst, 1}, tables).ok());
    Cursor cursor;
    DeviceTicket ticket = 0;
    REQUIRE(copier.launch(tables, copy, cursor, UINT64_MAX, 0, ticket).ok());
    CHECK(at_end(copy, cursor));
    wait_for(copier, ticket);
  }
  CHECK(wakes == 1);
  CHECK(std::memcmp(memory.src, memory.dst, 20000 << 10) == 0);
  CHECK(std::memcmp(memory.src + (20500 << 10), memory.dst + (20500 << 10), 1024) == 0);
  CHECK(memory.dst[20001 << 10] == std::byte{0});
}

TEST_CASE("long runs go in batches of the copy engine, which a kernel begins where nothing else is under way") {
  fake_cuda::install();
  fake_cuda::set_delay_us(500);
  constexpr uint32_t kRun = 1536, kPairs = 24;                                           // 1.5 MiB
  const PagedCopy copy = buffers(kPairs, kRun, [](uint64_t i) { return i * i << 10; });  // unevenly apart
  const uint64_t end = uint64_t{kPairs} * (kRun + kPairs) << 10;
  Buffers memory(end);
  DeviceCopier copier(0, {});
  for (const uint64_t piece : {uint64_t{UINT64_MAX}, uint64_t{17} << 20}) {  // which ends within a run
    std::memset(memory.dst, 0, end);
    const unsigned batches = fake_cuda::engine_batches();
    const unsigned by_engine = engine_copies_of(copier, copy, memory, piece);
    CHECK(by_engine > kPairs / 2);
    CHECK(by_engine < kPairs);
    CHECK(fake_cuda::engine_batches() - batches == (piece == UINT64_MAX ? 1 : 2));  // what is left is the kernel's
  }
  // Two pieces into one place: the later one's bytes stay, and it is the engine's alone.
  const std::vector<uint64_t> src(kPairs, reinterpret_cast<uint64_t>(memory.src));
  const std::vector<uint64_t> other(kPairs, reinterpret_cast<uint64_t>(memory.src) + 1024);
  const std::vector<uint64_t> dst(kPairs, reinterpret_cast<uint64_t>(memory.dst));
  PagedCopy fewer = copy;
  fewer.runs = {{0, 0, kRun - 1}};
  fewer.seal();
  DeviceTables first = 0, second = 0;
  REQUIRE(copier.prepare(fewer, DeviceForm::kPaged, other, dst, first).ok());
  REQUIRE(copier.prepare(fewer, DeviceForm::kPaged, src, dst, second).ok());
  DeviceTicket ticket = 0;
  for (const DeviceTables tables : {first, second}) {
    const unsigned before = fake_cuda::engine_copies();
    Cursor cursor;
    REQUIRE(copier.launch(tables, fewer, cursor, UINT64_MAX, 0, ticket).ok());
    CHECK((fake_cuda::engine_copies() - before == kPairs) == (tables == second));
  }
  wait_for(copier, ticket);
  CHECK(in_place(fewer, memory));
  fake_cuda::set_delay_us(0);
}

TEST_CASE("a batch has no more copies than a call takes, and no short ones") {
  fake_cuda::install();
  constexpr uint32_t kRun = 1024;  // 1 MiB
  Buffers memory(uint64_t{40} * kRun << 10);
  const auto engine_copies = [&](const PagedCopy& copy, unsigned copies, unsigned batches) {
    DeviceCopier copier(0, {});  // which has not learnt anything
    std::memset(memory.dst, 0xa5, uint64_t{40} * kRun << 10);
    const unsigned before = fake_cuda::engine_batches();
    CHECK(engine_copies_of(copier, copy, memory, UINT64_MAX) == copies);
    CHECK(fake_cuda::engine_batches() - before == batches);
  };
  const auto even = [](uint64_t) { return 0; };
  engine_copies(buffers(40, kRun, even), 27, 1);  // the kernel begins with a third
  engine_copies(buffers(15, kRun, even), 0, 0);   // too few bytes
  engine_copies(buffers(40, kRun - 1, even), 0, 0);
  PagedCopy mixed = buffers(40, kRun, even);  // one buffer's runs are short
  mixed.pairs[18].slot_bytes = mixed.pairs[18].src_stride = mixed.pairs[18].dst_stride = 512;
  mixed.seal();
  engine_copies(mixed, 0, 0);
  PagedCopy sparse = buffers(19, 2 * kRun, even);  // runs of slots that do not touch
  for (RegionPair& pair : sparse.pairs) pair.slot_bytes = 512;
  sparse.seal();
  engine_copies(sparse, 0, 0);
  fake_cuda::refuse_batches(true);
  engine_copies(buffers(40, kRun, even), 0, 0);
  engine_copies(buffers(1, 20 * kRun, even), 1, 0);
  fake_cuda::refuse_batches(false);
  // All of these read and write one place, one after the other behind a kernel that is under way.
  PagedCopy many = buffers(kMostBatched + 44, kRun, even);
  for (RegionPair& pair : many.pairs) pair.src_offset = pair.dst_offset = 0;
  const PagedCopy few = pages(1024, 8);
  DeviceCopier copier(0, {});
  const std::vector<uint64_t> src(many.pairs.size(), reinterpret_cast<uint64_t>(memory.src));
  const std::vector<uint64_t> dst(many.pairs.size(), reinterpret_cast<uint64_t>(memory.dst));
  DeviceTables before = 0, tables = 0;
  DeviceTicket ticket = 0;
  Cursor at, cursor;
  REQUIRE(copier.prepare(few, DeviceForm::kPaged, {src.data(), 1}, {dst.data(), 1}, before).ok());
  REQUIRE(copier.prepare(many, DeviceForm::kPaged, src, dst, tables).ok());
  const unsigned copies = fake_cuda::engine_copies(), batches = fake_cuda::engine_batches();
  REQUIRE(copier.launch(before, few, at, UINT64_MAX, 0, ticket).ok());
  REQUIRE(copier.launch(tables, many, cursor, UINT64_MAX, 0, ticket).ok());
  REQUIRE(at_end(many, cursor));
  wait_for(copier, ticket);
  CHECK(fake_cuda::engine_copies() - copies == many.pairs.size());
  CHECK(fake_cuda::engine_batches() - batches == 2);
  CHECK(in_place(many, memory));
}

TEST_CASE("what the driver refuses to the copy engine goes by the kernel") {
  fake_cuda::install();
  constexpr uint32_t kRun = 1536, kPairs = 16;  // 1.5 MiB
  Buffers memory(uint64_t{kPairs} * kRun << 10);
  const PagedCopy batch = buffers(kPairs, kRun, [](uint64_t) { return 0; });
  const PagedCopy run = buffers(1, kPairs * kRun, [](uint64_t) { return 0; });
  for (const PagedCopy& copy : {batch, run}) {
    DeviceCopier copier(0, {});
    CHECK(engine_copies_of(copier, copy, memory, UINT64_MAX) > 0);
    for (int i = 0; i < 2; ++i) {
      fake_cuda::refuse_engine_copies(i == 0);  // and it is not asked again
      std::memset(memory.dst, 0, uint64_t{kPairs} * kRun << 10);
      CHECK(engine_copies_of(copier, copy, memory, UINT64_MAX) == 0);
      CHECK(copier.describe().find("refused by the driver") != std::string::npos);
    }
  }
}

TEST_CASE("long runs go by the kernel when the copy engine is found to be slower") {
  fake_cuda::install();
  constexpr uint32_t kRun = 1024, kPairs = 20;  // 1 MiB
  Buffers memory(uint64_t{kPairs} * kRun << 10);
  DeviceCopier copier(0, {});
  const PagedCopy long_runs = buffers(kPairs, kRun, [](uint64_t) { return 0; });
  PagedCopy two_runs = long_runs;
  two_runs.runs = {{0, 0, kRun / 2 - 1}, {kRun / 2, kRun / 2, kRun / 2}};
  two_runs.seal();
  const auto begin = std::chrono::steady_clock::now();
  CHECK(engine_copies_of(copier, two_runs, memory, UINT64_MAX) == 0);
  const auto took = std::chrono::steady_clock::now() - begin;  // half a second under a sanitizer
  CHECK(copier.describe().ends_with("GB/s by the kernel"));
  fake_cuda::set_engine_delay_ms(20 + static_cast<unsigned>(took / std::chrono::milliseconds(1)));
  CHECK(engine_copies_of(copier, long_runs, memory, UINT64_MAX) > 4);
  CHECK(copier.describe().ends_with("GB/s by the copy engine"));
  std::memset(memory.dst, 0, uint64_t{kPairs} * kRun << 10);
  CHECK(engine_copies_of(copier, long_runs, memory, UINT64_MAX) == 0);
  fake_cuda::set_engine_delay_ms(0);
}

TEST_CASE("what has been slower for some pieces is taken for slower, and tried again") {
  const auto by_engine = [](EngineChoice& choice, int pieces, uint64_t bytes, uint64_t kernel_us, uint64_t engine_us) {
    int count = 0;
    for (int i = 0; i < pieces; ++i) {
      const EngineChoice::Way way = choice.next(bytes);
      count += way == EngineChoice::kEngine;
      choice.tell(way, bytes, 1000 * (way == EngineChoice::kEngine ? engine_us : kernel_us));
    }
    return count;
  };
  constexpr uint64_t kLarge = 256 << 20, kSmall = 16 << 20;
  EngineChoice choice;
  CHECK(choice.gbps(EngineChoice::kEngine) == 0);
  CHECK(by_engine(choice, 1000, kLarge, 700, 650) == 1000 - 3);
  CHECK(choice.gbps(EngineChoice::kEngine) == doctest::Approx(413).epsilon(0.01));
  CHECK(choice.gbps(EngineChoice::kKernel) == doctest::Approx(383).epsilon(0.01));
  choice.tell(EngineChoice::kEngine, kLarge, 90'000'000);  // held up once
  CHECK(choice.next(kLarge) == EngineChoice::kEngine);
  CHECK(by_engine(choice, 1000, kLarge, 700, 1400) < 40);  // slower from now on
  CHECK(by_engine(choice, 1000, kLarge, 700, 600) > 700);  // and quicker again
  // Other sizes have rates of their own, and what is smaller is the kernel's.
  CHECK(by_engine(choice, 1000, kSmall, 45, 60) < 260);
  CHECK(by_engine(choice, 200, kSmall, 45, 60) <= 1);
  CHECK(by_engine(choice, 100, kLarge, 700, 600) >= 99);
  CHECK(by_engine(choice, 1000, kSmall - 1, 45, 10) == 0);
}

TEST_CASE("blocks are launched in clusters where the device takes them") {
  fake_cuda::install();
  const PagedCopy copy = pages(1024, 256);
  Buffers memory(256 << 10);
  const uint64_t src = reinterpret_cast<uint64_t>(memory.src), dst = reinterpret_cast<uint64_t>(memory.dst);
  const auto clustered = [&](uint32_t blocks) {
    DeviceCopyOptions options;
    options.blocks = blocks;
    DeviceCopier copier(0, options);
    const unsigned before = fake_cuda::clustered_launches();
    for (int i = 0; i < 2; ++i) {
      std::memset(memory.dst, 0, 256 << 10);
      DeviceTables tables = 0;
      DeviceTicket ticket = 0;
      Cursor cursor;
      REQUIRE(copier.prepare(copy, DeviceForm::kPaged, {&src, 1}, {&dst, 1}, tables).ok());
      REQUIRE(copier.launch(tables, copy, cursor, UINT64_MAX, 0, ticket).ok());
      wait_for(copier, ticket);
      CHECK(in_place(copy, memory));
    }
    return fake_cuda::clustered_launches() - before;
  };
  CHECK(clustered(4) == 2);
  CHECK(clustered(3) == 0);
  fake_cuda::refuse_clusters(true);
  CHECK(clustered(4) == 0);
  fake_cuda::refuse_clusters(false);
}

TEST_CASE("a piece is over with all before it, also where pieces overlap") {
  fake_cuda::install();
  fake_cuda::set_delay_us(300);
  const PagedCopy copy = pages(1024, 256);
  Buffers memory(256 << 10);
  std::byte* const buffer = fake_cuda::allocate(0, 256 << 10);
  const uint64_t src = reinterpret_cast<uint64_t>(memory.src), dst = reinterpret_cast<uint64_t>(memory.dst);
  DeviceCopier copier(0, {});
  const DeviceForm forms[] = {DeviceForm::kGather, DeviceForm::kScatter, DeviceForm::kPaged};
  DeviceTables tables[3];
  for (int i = 0; i < 3; ++i) REQUIRE(copier.prepare(copy, forms[i], {&src, 1}, {&dst, 1}, tables[i]).ok());
  std::mt19937 random(5);
  for (int round = 0; round < 20; ++round) {
    // Gathers and slots-to-slots pieces in any order; the last one's ticket stands for all of them.
    std::memset(memory.dst, 0, 256 << 10);
    std::memset(buffer, 0, 256 << 10);
    Cursor at[2];
    DeviceTicket last = 0;
    for (DeviceTicket ticket = 0; !at_end(copy, at[0]) || !at_end(copy, at[1]); last = std::max(last, ticket)) {
      const size_t which = at_end(copy, at[0]) ? 1 : at_end(copy, at[1]) ? 0 : random() % 2;
      const uint64_t to = reinterpret_cast<uint64_t>(buffer) + position(copy, at[which]);
      REQUIRE(copier.launch(tables[which * 2], copy, at[which], 16 << 10, which == 0 ? to : 0, ticket).ok());
    }
    wait_for(copier, last);
    for (uint32_t i = 0; i < 256; ++i) CHECK(std::memcmp(memory.src + i * 1024, buffer + i * 1024, 1024) == 0);
    for (uint32_t i = 0; i < 256; ++i)
      CHECK(std::memcmp(memory.src + i * 1024, memory.dst + (255 - i) * 1024, 1024) == 0);
    // And back through the buffer.
    std::memset(memory.dst, 0, 256 << 10);
    DeviceTicket ticket = 0;
    for (Cursor cursor; !at_end(copy, cursor);) {
      const uint64_t from = reinterpret_cast<uint64_t>(buffer) + position(copy, cursor);
      REQUIRE(copier.launch(tables[1], copy, cursor, 16 << 10, from, ticket).ok());
    }
    wait_for(copier, ticket);
    for (uint32_t i = 0; i < 256; ++i)
      CHECK(std::memcmp(memory.src + i * 1024, memory.dst + (255 - i) * 1024, 1024) == 0);
  }
  fake_cuda::set_delay_us(0);
  fake_cuda::release(buffer);
}

TEST_CASE("a device error is final, and names the call") {
  fake_cuda::install();
  const PagedCopy copy = pages(1024, 8);
  Buffers memory(8 << 10);
  const uint64_t src = reinterpret_cast<uint64_t>(memory.src), dst = reinterpret_cast<uint64_t>(memory.dst);
  DeviceCopier copier(0, {});
  DeviceTables tables = 0;
  REQUIRE(copier.prepare(copy, DeviceForm::kPaged, {&src, 1}, {&dst, 1}, tables).ok());
  fake_cuda::fail_next_launch(719);
  Cursor cursor;
  DeviceTicket ticket = 0;
  for (int i = 0; i < 2; ++i) {
    const Status status = copier.launch(tables, copy, cursor, UINT64_MAX, 0, ticket);
    CHECK(status.code == Code::kInternal);
    CHECK(status.native == 719);
    CHECK(status.to_string().ends_with(": CUDA_ERROR_FAKE (719)"));  // not an errno
    CHECK(std::string(status.where) == "cuLaunchKernel of pdx_paged_copy");
  }
}

TEST_CASE("a piece with a checksum tells what of it is in place, in order, and all of it in the end") {
  fake_cuda::install();
  constexpr uint32_t kPages = 24 << 10;  // of 1 KiB: half, a quarter, and the rest
  const PagedCopy copy = pages(1024, kPages);
  Buffers memory(kPages << 10);
  DeviceCopyOptions options;
  options.checksum = true;
  DeviceCopier copier(0, options);
  const uint64_t src = reinterpret_cast<uint64_t>(memory.src), dst = reinterpret_cast<uint64_t>(memory.dst);
  DeviceTables tables = 0;
  REQUIRE(copier.prepare(copy, DeviceForm::kPaged, {&src, 1}, {&dst, 1}, tables).ok());
  for (int round = 0; round < 3; ++round) {  // whose counters begin at zero again
    std::memset(memory.dst, 0, copy.bytes);
    DeviceTicket ticket = 0;
    Cursor cursor;
    REQUIRE(copier.launch(tables, copy, cursor, UINT64_MAX, 0, ticket).ok());
    uint64_t landed = 0;
    bool over = false;
    for (int i = 0; i < 1000000 && !over; ++i) {
      std::this_thread::sleep_for(std::chrono::microseconds(20));
      const uint64_t now = copier.landed(ticket);
      CHECK(now >= landed);
      for (Cursor at; landed < now;) {  // what was told is there: the last page of it
        advance(copy, at, now - 1024);
        const Extent e = next_extent(copy, at, 1024);
        CHECK(std::memcmp(memory.dst + e.dst_offset, memory.src + e.src_offset, 1024) == 0);
        landed = now;
      }
      REQUIRE(copier.done(ticket, over).ok());
    }
    REQUIRE(over);
    CHECK(copier.landed(ticket) == copy.bytes);
  }
  copier.release(tables);
}

}  // namespace pdxfer::pack
