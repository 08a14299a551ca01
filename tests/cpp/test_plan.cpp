// Runs, pairings and copies on their own: scalar against vector scan, order and merging, refusals, overflow.
#include <doctest/doctest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <string>

#include "core/paged_copy.hpp"
#include "plan/make_copy.hpp"

using namespace pdxfer;
using namespace pdxfer::plan;

namespace {

std::vector<int32_t> iota(size_t n, int32_t from) {
  std::vector<int32_t> out(n);
  std::iota(out.begin(), out.end(), from);
  return out;
}

template <typename Call>
std::string refusal(Call&& call) {
  try {
    call();
  } catch (const Error& error) {
    CHECK(error.code() == Code::kInvalid);
    return error.what();
  }
  return "nothing was refused";
}

bool contains(const std::string& text, const char* part) {
  INFO(text);
  return text.find(part) != std::string::npos;
}

Layout one_buffer(uint64_t page_bytes, uint64_t slots) {
  Layout layout;
  layout.buffers = {{1, 0}};
  layout.page_bytes = {page_bytes};
  layout.slots = slots;
  return layout;
}

}  // namespace

TEST_CASE("the vector scan and the portable one agree at every length and alignment") {
  std::mt19937 random(1);
  for (size_t n : {1, 2, 7, 8, 9, 15, 16, 17, 33, 100, 1023, 1024, 1025, 1032, 1033, 4100}) {
    for (size_t offset = 0; offset < 4; ++offset) {
      for (unsigned break_one_in : {1u, 2u, 9u, 300u}) {
        std::vector<int32_t> src(offset + n), dst(offset + n);
        int32_t s = 0, d = 0;
        for (size_t i = offset; i < src.size(); ++i) {
          src[i] = s += random() % break_one_in == 0 ? 3 : 1;
          dst[i] = d += random() % break_one_in == 0 ? 2 : 1;
        }
        const std::span<const int32_t> a = std::span(src).subspan(offset), b = std::span(dst).subspan(offset);
        const auto runs = find_runs(a, b, 1 << 20, 1 << 20);
        CHECK(runs == find_runs_portable(a, b, 1 << 20, 1 << 20));
        const std::vector<int64_t> a64(a.begin(), a.end()), b64(b.begin(), b.end());
        CHECK(runs == find_runs(std::span(a64), std::span(b64), 1 << 20, 1 << 20));
        size_t at = 0;
        for (const Run& run : runs)
          for (uint32_t k = 0; k < run.count; ++k, ++at) {
            REQUIRE(static_cast<int32_t>(run.src_slot + k) == a[at]);
            REQUIRE(static_cast<int32_t>(run.dst_slot + k) == b[at]);
          }
        CHECK(at == n);
      }
    }
  }
}

TEST_CASE("runs ascend by destination and merge, with few runs and with many") {
  for (const size_t n : {100u, 5000u}) {
    auto src = iota(n, 7), dst = iota(n, 40);
    std::reverse(src.begin(), src.end());
    std::reverse(dst.begin(), dst.end());
    CHECK(find_runs(src, dst, 1 << 20, 1 << 20) == std::vector<Run>{{7, 40, static_cast<uint32_t>(n)}});
    auto order = iota(n, 0);
    std::shuffle(order.begin(), order.end(), std::mt19937(2));
    for (size_t i = 0; i < n; ++i) {
      src[i] = 2 * order[i];
      dst[i] = 1000000 - 3 * order[i];
    }
    const auto runs = find_runs(src, dst, 1 << 20, 1 << 20);
    REQUIRE(runs.size() == n);
    for (size_t i = 0; i < n; ++i)
      REQUIRE(runs[i] ==
              Run{static_cast<uint32_t>(2 * (n - 1 - i)), static_cast<uint32_t>(1000000 - 3 * (n - 1 - i)), 1});
  }
}

TEST_CASE("many runs ascend by destination in pools of any size") {
  std::mt19937 random(4);
  for (const unsigned bits : {10u, 11u, 12u, 22u, 23u, 32u}) {
    CAPTURE(bits);
    const uint64_t apart = (uint64_t{1} << bits) / 1024;  // between the places that runs may begin at
    auto places = iota(1024, 0);
    std::shuffle(places.begin(), places.end(), random);
    places.resize(700);
    std::vector<int64_t> src, dst;
    std::vector<Run> want;
    for (size_t i = 0; i < places.size(); ++i) {
      const uint32_t count = 1 + random() % std::min<uint64_t>(apart, 3);
      want.push_back({static_cast<uint32_t>(5 * i), static_cast<uint32_t>(places[i] * apart), count});
      for (uint32_t k = 0; k < count; ++k) {
        src.push_back(want[i].src_slot + k);
        dst.push_back(int64_t{want[i].dst_slot} + k);
      }
    }
    std::ranges::sort(want, {}, &Run::dst_slot);
    CHECK(find_runs(std::span(src), std::span(dst), 5000, uint64_t{1} << bits) == want);
    dst.back() = dst.front();
    CHECK(contains(refusal([&] { find_runs(std::span(src), std::span(dst), 5000, uint64_t{1} << bits); }), "so is"));
  }
  const std::vector<int32_t> zeros(600, 0);
  CHECK(contains(refusal([&] { find_runs(iota(600, 0), zeros, 1000, 1); }), "dst_pages[1] is 0"));
}

TEST_CASE("destination pages above 2^31 and the last ones are ordered and kept whole") {
  const std::vector<int64_t> src{0, 1, 2, 3}, dst{(int64_t{1} << 32) - 1, 5, (int64_t{1} << 31), 4};
  const auto runs = find_runs(std::span(src), std::span(dst), 10, uint64_t{1} << 32);
  CHECK(runs == std::vector<Run>{{3, 4, 1}, {1, 5, 1}, {2, 1u << 31, 1}, {0, UINT32_MAX, 1}});
}

TEST_CASE("a negative page is refused even where its unsigned look would be in range") {
  const std::vector<int32_t> ok{1, 2}, bad{1, -2};
  CHECK(contains(refusal([&] { find_runs(ok, bad, UINT32_MAX, UINT32_MAX); }), "dst_pages[1] is -2"));
  CHECK(contains(refusal([&] { find_runs(bad, ok, UINT32_MAX, UINT32_MAX); }), "src_pages[1] is -2"));
}

TEST_CASE("duplicates are found among adjacent, distant and inside runs") {
  const auto check = [](std::vector<int32_t> dst, const char* text) {
    const auto src = iota(dst.size(), 0);
    CHECK(contains(refusal([&] { find_runs(src, dst, 1 << 20, 1 << 20); }), text));
    CHECK(find_runs(src, dst, 1 << 20, 1 << 20, {.allow_duplicates = true}).size() > 1);
  };
  check({5, 5}, "dst_pages[1] is 5, and so is dst_pages[0]");
  check({10, 11, 12, 13, 12}, "dst_pages[4] is 12, and so is dst_pages[2]");
  auto many = iota(4000, 0);
  std::shuffle(many.begin(), many.end(), std::mt19937(3));
  many.push_back(many[1234]);
  check(many, "dst_pages[4000] is");
}

TEST_CASE("allowed duplicates keep the order of the arrays") {
  const std::vector<int32_t> src{1, 2, 3}, dst{9, 4, 9};
  CHECK(find_runs(src, dst, 10, 10, {.allow_duplicates = true}) == std::vector<Run>{{1, 9, 1}, {2, 4, 1}, {3, 9, 1}});
}

TEST_CASE("re-sharded heads turn runs of pages into runs of tokens") {
  Layout src = one_buffer(16 * 4 * 8, 50), dst = one_buffer(16 * 2 * 8, 60);
  src.page_size = dst.page_size = 16;
  src.total_heads = dst.total_heads = 4;
  dst.tp_size = 2;
  dst.tp_rank = 1;
  const PagedCopy copy = make_copy(pair_layouts(src, dst), std::span<const int32_t>(iota(3, 5)), iota(3, 20));
  CHECK(copy.runs == std::vector<Run>{{80, 320, 48}});
  REQUIRE(copy.pairs.size() == 1);
  CHECK(copy.pairs[0].src_offset == 16);
  CHECK(copy.pairs[0].src_stride == 32);
  CHECK(copy.pairs[0].dst_stride == 16);
  CHECK(copy.pairs[0].slot_bytes == 16);
  CHECK(copy.slots == 48);
  CHECK(copy.bytes == 48 * 16);
  CHECK(copy.src_slot_end == 128);
  CHECK(copy.dst_slot_end == 368);
}

TEST_CASE("heads sharded in ranges that do not nest still pair by intersection") {
  Layout src = one_buffer(2 * 8, 10), dst = one_buffer(3 * 8, 10);  // 6 heads: ranks of 2 and of 3
  src.total_heads = dst.total_heads = 6;
  src.tp_size = 3;
  src.tp_rank = 1;  // heads 2, 3
  dst.tp_size = 2;  // heads 0, 1, 2
  const Pairing pairing = pair_layouts(src, dst);
  REQUIRE(pairing.pairs.size() == 1);
  CHECK(pairing.pairs[0].src_offset == 0);
  CHECK(pairing.pairs[0].dst_offset == 16);
  CHECK(pairing.pairs[0].slot_bytes == 8);
}

TEST_CASE("a pairing made by hand cannot overflow slots") {
  Pairing pairing = pair_layouts(one_buffer(8, 10), one_buffer(8, 10));
  pairing.slots_per_page = 64;
  pairing.dst_pages = uint64_t{1} << 31;
  const std::vector<int32_t> src{1}, dst{INT32_MAX};
  CHECK(contains(refusal([&] { make_copy(pairing, std::span<const int32_t>(src), dst); }), "exceeds 4294967295 slots"));
}

TEST_CASE("seal: totals, and runs from a hostile wire that no region may fit") {
  const auto any_size = [](RegionId) { return uint64_t{1} << 62; };
  PagedCopy copy;
  copy.pairs = {{1, 2, 0, 0, 8, 8, 8}, {3, 4, 0, 0, 100, 100, 50}};
  copy.runs = {{0, 5, 2}, {9, 1, 3}};
  copy.seal();
  CHECK(copy.slots == 5);
  CHECK(copy.bytes == 5 * 58);
  CHECK(copy.src_slot_end == 12);
  CHECK(copy.dst_slot_end == 7);
  CHECK(check_range(copy, Side::kSrc, any_size).ok());
  copy.runs.push_back({0, 0, 0});
  copy.seal();
  CHECK(check_range(copy, Side::kSrc, any_size).code == Code::kInvalid);
  CHECK(check_range(copy, Side::kDst, any_size).code == Code::kInvalid);
  copy.runs = {{0, 0, UINT32_MAX}, {0, 0, UINT32_MAX}};
  copy.pairs.assign(4, {1, 2, 0, 0, uint64_t{1} << 31, uint64_t{1} << 31, uint64_t{1} << 31});
  copy.seal();
  CHECK(check_range(copy, Side::kDst, any_size).code == Code::kInvalid);
}

TEST_CASE("check_range is exact at the last byte and safe against wrapping") {
  PagedCopy copy;
  copy.pairs = {{1, 2, 10, 20, 8, 16, 4}};
  copy.runs = {{0, 0, 3}};
  copy.seal();
  const auto size = [](uint64_t bytes) { return [bytes](RegionId) { return bytes; }; };
  CHECK(check_range(copy, Side::kSrc, size(10 + 2 * 8 + 4)).ok());
  CHECK_FALSE(check_range(copy, Side::kSrc, size(10 + 2 * 8 + 3)).ok());
  CHECK(check_range(copy, Side::kDst, size(20 + 2 * 16 + 4)).ok());
  CHECK_FALSE(check_range(copy, Side::kDst, size(20 + 2 * 16 + 3)).ok());
  CHECK_FALSE(check_range(copy, Side::kDst, size(0)).ok());
  for (const uint64_t huge : {UINT64_MAX, UINT64_MAX / 2 + 1}) {
    copy.pairs[0].src_offset = huge;
    CHECK_FALSE(check_range(copy, Side::kSrc, size(uint64_t{1} << 40)).ok());
    copy.pairs[0] = {1, 2, 0, 20, huge, 16, 4};
    CHECK_FALSE(check_range(copy, Side::kSrc, size(uint64_t{1} << 40)).ok());
  }
}

TEST_CASE("extents merge, drop empty ones and refuse wrapping") {
  const std::vector<uint32_t> ids{1, 1, 1}, others{1, 1, 2};
  const std::vector<uint64_t> from{0, 8, 16}, to{100, 108, 116}, bytes{8, 8, 8};
  CHECK(extents_copy({ids, from, ids, to, bytes}).pairs.size() == 1);
  const PagedCopy copy = extents_copy({ids, from, others, to, bytes});
  CHECK(copy.pairs.size() == 2);
  CHECK(copy.runs == std::vector<Run>{{0, 0, 1}});
  CHECK(copy.bytes == 24);
  CHECK(at_end(extents_copy({}), Cursor{}));
  const std::vector<uint64_t> high{0, UINT64_MAX, 0};
  CHECK(contains(refusal([&] { extents_copy({ids, high, ids, to, bytes}); }), "src_offsets[1]"));
  CHECK(contains(refusal([&] { extents_copy({ids, from, ids, high, bytes}); }), "dst_offsets[1]"));
}
