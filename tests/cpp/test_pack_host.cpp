// The host copy and the cursor beneath it: every byte exactly once whatever the budgets, sizes, alignments, threads.
#include <dirent.h>
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <fstream>
#include <random>
#include <string>
#include <thread>

#include "core/copy_choice.hpp"
#include "core/paged_copy.hpp"
#include "pack/paged_copy_host.hpp"
#include "pack/stream_copy.hpp"

using namespace pdxfer;
using pack::HostCopier;

namespace {

// Source and destination memory for a copy, and what the destination must hold afterwards.
struct Bench {
  PagedCopy copy;
  std::vector<std::byte> src, dst, want;
  std::vector<std::byte*> src_base, dst_base;

  void fill(size_t bytes, std::mt19937& random) {
    src.resize(bytes);
    for (size_t i = 0; i + 4 <= bytes; i += 4) {
      const uint32_t word = random();
      std::memcpy(&src[i], &word, 4);
    }
    dst.assign(bytes, std::byte{0xEE});
    copy.seal();
    src_base.assign(copy.pairs.size(), src.data());
    dst_base.assign(copy.pairs.size(), dst.data());
    REQUIRE(check_range(copy, Side::kSrc, [&](RegionId) { return bytes; }).ok());
    REQUIRE(check_range(copy, Side::kDst, [&](RegionId) { return bytes; }).ok());
    want = dst;
    for (const RegionPair& p : copy.pairs)
      for (const Run& r : copy.runs)
        for (uint64_t k = 0; k < r.count; ++k)
          std::copy_n(src.begin() + static_cast<ptrdiff_t>(p.src_offset + (r.src_slot + k) * p.src_stride),
                      p.slot_bytes,
                      want.begin() + static_cast<ptrdiff_t>(p.dst_offset + (r.dst_slot + k) * p.dst_stride));
  }
};

// `pairs` buffers of `slots` slots, random runs, no destination twice; strided when `gap` is not 0.
Bench make_bench(std::mt19937& random, size_t pairs, uint32_t slots, uint64_t slot_bytes, uint64_t gap) {
  Bench bench;
  uint64_t at = random() % 64;
  for (uint32_t i = 0; i < pairs; ++i) {
    bench.copy.pairs.push_back({1, 1, at, at, slot_bytes + gap, slot_bytes + 2 * gap, slot_bytes});
    at += slots * (slot_bytes + 2 * gap) + random() % 100;
  }
  for (uint32_t d = 0; d < slots;) {
    const uint32_t count = std::min<uint32_t>(slots - d, 1 + random() % 5);
    bench.copy.runs.push_back({static_cast<uint32_t>(random() % (slots - count + 1)), d, count});
    d += count + random() % 3;
  }
  std::shuffle(bench.copy.runs.begin(), bench.copy.runs.end(), random);
  bench.fill(at, random);
  return bench;
}

size_t named_threads(const std::string& prefix) {
  size_t count = 0;
  DIR* dir = opendir("/proc/self/task");
  REQUIRE(dir != nullptr);
  while (const dirent* entry = readdir(dir)) {
    std::ifstream file("/proc/self/task/" + std::string(entry->d_name) + "/comm");
    std::string name;
    if (std::getline(file, name) && name.starts_with(prefix)) ++count;
  }
  closedir(dir);
  return count;
}

}  // namespace

TEST_CASE("extents at random budgets cover every byte exactly once, and advance agrees") {
  std::mt19937 random(1);
  for (int round = 0; round < 60; ++round) {
    const Bench bench = make_bench(random, 1 + random() % 4, 1 + random() % 30, 1 + random() % 40, random() % 3);
    std::vector<int> writes(bench.dst.size(), 0), expected(bench.dst.size(), 0);
    for (const RegionPair& p : bench.copy.pairs)
      for (const Run& r : bench.copy.runs)
        for (uint64_t k = 0; k < r.count * p.slot_bytes; ++k)
          ++expected[p.dst_offset + (r.dst_slot + k / p.slot_bytes) * p.dst_stride + k % p.slot_bytes];
    Cursor cursor, by_extent;
    uint64_t total = 0;
    while (!at_end(bench.copy, cursor)) {
      const uint64_t budget = 1 + random() % 200;
      const Cursor before = cursor;
      const Extent e = next_extent(bench.copy, cursor, budget);
      REQUIRE(e.bytes > 0);
      REQUIRE(e.bytes <= budget);
      for (uint64_t k = 0; k < e.bytes; ++k) ++writes[e.dst_offset + k];
      Cursor skipped = before;
      CHECK(advance(bench.copy, skipped, e.bytes) == e.bytes);
      CHECK(skipped == cursor);
      total += e.bytes;
      by_extent = {};
      CHECK(advance(bench.copy, by_extent, total) == total);
      CHECK(by_extent == cursor);
    }
    CHECK(total == bench.copy.bytes);
    CHECK(writes == expected);
    CHECK(advance(bench.copy, cursor, 100) == 0);
    Cursor all;
    CHECK(advance(bench.copy, all, UINT64_MAX) == total);
    CHECK(at_end(bench.copy, all));
  }
}

TEST_CASE("small extents are those that next_extent gives, and end where it would go on") {
  std::mt19937 random(6);
  size_t seen = 0;
  for (int round = 0; round < 200; ++round) {
    const Bench bench = make_bench(random, 1 + random() % 4, 1 + random() % 30, 1 + random() % 40, random() % 3);
    Cursor cursor;
    while (!at_end(bench.copy, cursor)) {
      const uint64_t budget = 1 + random() % 400, most = random() % 80;
      const size_t count = random() % 20;
      const Cursor before = cursor;
      Cursor expected = cursor;
      uint64_t total = 0;
      const size_t taken = take_small_extents(bench.copy, cursor, budget, most, count,
                                              [&](uint64_t src_offset, uint64_t dst_offset, uint64_t bytes) {
                                                const Extent e = next_extent(bench.copy, expected, UINT64_MAX);
                                                CHECK(e.pair == before.pair);
                                                CHECK(e.src_offset == src_offset);
                                                CHECK(e.dst_offset == dst_offset);
                                                CHECK(e.bytes == bytes);
                                                CHECK(bytes <= most);
                                                total += bytes;
                                              });
      REQUIRE(cursor == expected);
      CHECK(total <= budget);
      CHECK(taken <= count);
      seen += taken;
      // What stopped it: the count, the end of the pair, or an extent that is partial, too long or past the budget.
      if (taken < count && cursor.pair == before.pair) {
        Cursor next = cursor;
        const Extent e = next_extent(bench.copy, next, UINT64_MAX);
        const bool partial = cursor.byte != 0 || (cursor.slot != 0 && dense(bench.copy.pairs[cursor.pair]));
        CHECK((partial || e.bytes > most || total + e.bytes > budget));
      }
      if (!at_end(bench.copy, cursor)) next_extent(bench.copy, cursor, 1 + random() % 60);
    }
  }
  CHECK(seen > 1000);
}

TEST_CASE("pairs of very different page sizes are copied one after the other") {
  // What is prefetched ahead is counted in pieces: their size changes by a factor of 100 from pair to pair.
  std::mt19937 random(7);
  Bench bench;
  uint64_t at = 16;
  for (const uint64_t slot_bytes : {64u, 6144u, 24u, 70000u, 8u, 2049u, 4096u, 6145u, 1025u}) {
    bench.copy.pairs.push_back({1, 1, at, at, slot_bytes, slot_bytes, slot_bytes});
    at += 150 * slot_bytes;
  }
  for (uint32_t slot = 0; slot < 150; ++slot) bench.copy.runs.push_back({(slot * 77) % 150, slot, 1});
  bench.fill(at, random);
  for (const uint64_t budget : {uint64_t{100000}, UINT64_MAX}) {
    std::fill(bench.dst.begin(), bench.dst.end(), std::byte{0xEE});
    HostCopier copier(1);
    Cursor cursor;
    uint64_t total = 0;
    while (const uint64_t step = copier.copy(bench.copy, cursor, budget, bench.src_base, bench.dst_base)) total += step;
    CHECK(total == bench.copy.bytes);
    CHECK(bench.dst == bench.want);
  }
}

TEST_CASE("every size, alignment and number of threads copies what it should and nothing else") {
  std::mt19937 random(2);
  for (const unsigned threads : {1u, 2u, 3u}) {
    HostCopier copier(threads);
    CHECK(copier.threads() == threads);
    for (const uint64_t slot_bytes : {1u, 3u, 63u, 64u, 65u, 255u, 256u, 1000u, 1152u, 2048u, 2049u, 70001u}) {
      for (const uint64_t gap : {0u, 1u, 64u}) {
        // The large ones pass the sizes from which stores bypass the caches and helpers take part.
        const auto slots = static_cast<uint32_t>(
            std::clamp<uint64_t>((gap == 0 && slot_bytes >= 1000 ? 5u << 20 : 1u << 17) / slot_bytes, 10, 6000));
        Bench bench = make_bench(random, 2, slots, slot_bytes, gap);
        Cursor cursor;
        uint64_t total = 0;
        while (true) {
          const uint64_t budget = random() % 3 == 0 ? UINT64_MAX : 1 + random() % (1u << 21);
          const uint64_t step = copier.copy(bench.copy, cursor, budget, bench.src_base, bench.dst_base);
          if (step == 0) break;
          REQUIRE(step <= budget);
          total += step;
        }
        CHECK(total == bench.copy.bytes);
        CHECK(at_end(bench.copy, cursor));
        CHECK(bench.dst == bench.want);
      }
    }
  }
}

TEST_CASE("a step copies exactly its budget and leaves the rest alone") {
  std::mt19937 random(3);
  Bench bench = make_bench(random, 3, 5000, 1024, 0);
  HostCopier copier(2);
  Cursor cursor;
  CHECK(copier.copy(bench.copy, cursor, 0, bench.src_base, bench.dst_base) == 0);
  CHECK(cursor == Cursor{});
  const uint64_t budget = 7777777;
  CHECK(copier.copy(bench.copy, cursor, budget, bench.src_base, bench.dst_base) == budget);
  Cursor expected;
  advance(bench.copy, expected, budget);
  CHECK(cursor == expected);
  const std::vector<std::byte> so_far = bench.dst;
  Cursor check;
  uint64_t done = 0;
  std::vector<std::byte> want(bench.dst.size(), std::byte{0xEE});
  while (done < budget) {
    const Extent e = next_extent(bench.copy, check, budget - done);
    std::copy_n(bench.src.begin() + static_cast<ptrdiff_t>(e.src_offset), e.bytes,
                want.begin() + static_cast<ptrdiff_t>(e.dst_offset));
    done += e.bytes;
  }
  CHECK(so_far == want);
}

TEST_CASE("an empty copy and a finished cursor copy nothing") {
  HostCopier copier(2);
  PagedCopy empty;
  empty.seal();
  Cursor cursor;
  CHECK(copier.copy(empty, cursor, UINT64_MAX, {}, {}) == 0);
}

TEST_CASE("several callers at once each get their own copy right") {
  std::mt19937 random(4);
  HostCopier copier(3);
  std::vector<Bench> benches;
  for (int i = 0; i < 3; ++i) benches.push_back(make_bench(random, 2, 8000, 1024, 0));
  std::vector<std::thread> callers;
  for (Bench& bench : benches)
    callers.emplace_back([&] {
      for (int repeat = 0; repeat < 3; ++repeat) {
        Cursor cursor;
        while (copier.copy(bench.copy, cursor, 5 << 20, bench.src_base, bench.dst_base) != 0) {
        }
      }
    });
  for (std::thread& caller : callers) caller.join();
  for (const Bench& bench : benches) CHECK(bench.dst == bench.want);
}

TEST_CASE("the way that is found faster is taken, the others tried now and then, until one is faster") {
  CopyChoice choice;
  // Turns that each way has of so many, when a MiB takes it so many microseconds.
  const auto turns = [&](int count, std::array<uint64_t, 3> us) {
    std::array<int, 3> taken{};
    for (int i = 0; i < count; ++i) {
      const CopyWay way = choice.next();
      REQUIRE(static_cast<size_t>(way) < taken.size());
      choice.tell(way, 1 << 20, 1000 * us[static_cast<size_t>(way)]);
      ++taken[static_cast<size_t>(way)];
    }
    return taken;
  };
  CHECK(turns(12, {5000, 60, 90}) == std::array{4, 4, 4});  // pages had to be made
  CHECK(choice.best() == CopyWay::kSecondLevel);
  CHECK(turns(251 * 16, {45, 60, 90})[0] > 251 * 8);
  CHECK(turns(251 * 16, {45, 60, 90}) == std::array{251 * 16 - 16, 8, 8});
  CHECK(turns(251 * 16, {300, 60, 90})[1] > 251 * 16 - 50);  // slower from some moment on
  CHECK(turns(251 * 16, {300, 60, 90}) == std::array{8, 251 * 16 - 16, 8});
  CHECK(turns(251 * 32, {300, 60, 20})[2] > 251 * 8);
  CHECK(choice.best() == CopyWay::kDirect);
}

TEST_CASE("a copy that was held up changes no choice") {
  CopyChoice choice;
  choice.tell(CopyWay::kFirstLevel, 1 << 20, 90'000);
  choice.tell(CopyWay::kSecondLevel, 1 << 20, 60'000);
  choice.tell(CopyWay::kDirect, 1 << 20, 90'000);
  for (int i = 0; i < 3; ++i) choice.tell(CopyWay::kSecondLevel, 1 << 20, 10'000'000);
  CHECK(choice.best() == CopyWay::kSecondLevel);
}

TEST_CASE("copies too short to be timed tell nothing") {
  CopyChoice choice;
  choice.tell(CopyWay::kFirstLevel, CopyChoice::kLeastBytes, 1000);
  choice.tell(CopyWay::kDirect, CopyChoice::kLeastBytes, 2000);
  choice.tell(CopyWay::kSecondLevel, CopyChoice::kLeastBytes, 2000);
  for (int i = 0; i < 100; ++i) choice.tell(CopyWay::kSecondLevel, CopyChoice::kLeastBytes - 1, 1);
  CHECK(choice.best() == CopyWay::kFirstLevel);
}

TEST_CASE("helper threads have names and are gone with the copier") {
  {
    HostCopier copier(4);
    CHECK(named_threads("pdx-copy-") == 3);
  }
  CHECK(named_threads("pdx-copy-") == 0);
  CHECK(HostCopier(0).threads() == 1);
  CHECK(HostCopier(1000).threads() == 64);
}

TEST_CASE("the streaming and the plain copy are exact around their edges") {
  std::mt19937 random(5);
  std::vector<std::byte> src(4000), dst(4000), want;
  for (std::byte& b : src) b = static_cast<std::byte>(random());
  for (const pack::CopyFn copy : {pack::streaming_copy(CacheLevel::kFirst), pack::streaming_copy(CacheLevel::kSecond),
                                  pack::plain_copy(CacheLevel::kFirst), pack::plain_copy(CacheLevel::kSecond)})
    for (size_t bytes = 0; bytes < 700; bytes += bytes < 300 ? 1 : 13)
      for (const size_t to : {0u, 1u, 31u, 32u, 33u, 63u}) {
        const size_t from = random() % 100;
        std::fill(dst.begin(), dst.end(), std::byte{0xEE});
        want = dst;
        // Two pieces of different sizes; what is prefetched meanwhile may be longer, shorter or nothing.
        const pack::Piece pieces[] = {{dst.data() + 100 + to, src.data() + from, bytes},
                                      {dst.data() + 2000 + 2 * to, src.data() + 1000, 700 - bytes}};
        const pack::Piece ahead[] = {{nullptr, src.data() + 2000, random() % 1500}, {}};
        for (const pack::Piece& piece : pieces)
          std::copy_n(piece.src, piece.bytes, want.begin() + (piece.dst - dst.data()));
        copy(pieces, ahead, 2);
        pack::streaming_fence();
        REQUIRE(dst == want);
      }
}
