// Run-finding; see runs.hpp. The scan is a kernel per instruction set over unsigned page numbers (a negative page is
// then a huge one, so one maximum per side checks both bounds); everything after it is O(runs), not O(pages).
#include "plan/runs.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pdxfer::plan {
namespace {

constexpr size_t kBlock = 1024;  // positions per kernel call: its breaks fit the stack
constexpr size_t kAhead = 512;   // positions prefetched: hardware stops at each page of a list that no cache holds
constexpr size_t kSpare = 8;     // what a kernel may write of `breaks` beyond those it found

struct Highest {
  uint32_t src = 0, dst = 0;
};

// Writes to `breaks` each i in [begin, end) where either side does not continue from i - 1; returns how many.
// Requires begin >= 1, and room for kSpare more.
using ScanFn = size_t (*)(const uint32_t* src, const uint32_t* dst, size_t begin, size_t end, uint32_t* breaks,
                          Highest& highest) noexcept;

size_t scan_portable(const uint32_t* src, const uint32_t* dst, size_t begin, size_t end, uint32_t* breaks,
                     Highest& highest) noexcept {
  size_t count = 0;
  uint32_t high_src = highest.src, high_dst = highest.dst;
  for (size_t i = begin; i < end; ++i) {
    breaks[count] = static_cast<uint32_t>(i);
    count += ((src[i] - src[i - 1] - 1) | (dst[i] - dst[i - 1] - 1)) != 0;  // no branch: random pages mispredict
    high_src = std::max(high_src, src[i]);
    high_dst = std::max(high_dst, dst[i]);
  }
  highest = {high_src, high_dst};
  return count;
}

#if defined(__x86_64__)
// For each mask of eight positions those that it names, a byte each, the rest 0.
constexpr std::array<uint64_t, 256> kPositions = [] {
  std::array<uint64_t, 256> all{};
  for (unsigned mask = 0; mask < 256; ++mask)
    for (unsigned bit = 8; bit-- > 0;)
      if ((mask >> bit & 1) != 0) all[mask] = all[mask] << 8 | bit;
  return all;
}();

__attribute__((target("avx2"))) uint32_t highest_lane(__m256i v) noexcept {
  alignas(32) std::array<uint32_t, 8> lane;
  _mm256_store_si256(reinterpret_cast<__m256i*>(lane.data()), v);
  return *std::max_element(lane.begin(), lane.end());
}

__attribute__((target("avx2"))) inline __m256i load(const uint32_t* p) noexcept {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

// Without a branch: where a loaded server's pages break, no processor foresees.
__attribute__((target("avx2,popcnt"))) size_t scan_avx2(const uint32_t* src, const uint32_t* dst, size_t begin,
                                                        size_t end, uint32_t* breaks, Highest& highest) noexcept {
  const __m256i one = _mm256_set1_epi32(1);
  __m256i high_src = _mm256_setzero_si256(), high_dst = high_src;
  size_t count = 0, i = begin;
  for (; i + 8 <= end; i += 8) {
    _mm_prefetch(reinterpret_cast<const char*>(src + i + kAhead), _MM_HINT_T0);  // past the end of a list: no effect
    _mm_prefetch(reinterpret_cast<const char*>(dst + i + kAhead), _MM_HINT_T0);
    const __m256i s = load(src + i), d = load(dst + i);
    high_src = _mm256_max_epu32(high_src, s);
    high_dst = _mm256_max_epu32(high_dst, d);
    const __m256i same = _mm256_and_si256(_mm256_cmpeq_epi32(s, _mm256_add_epi32(load(src + i - 1), one)),
                                          _mm256_cmpeq_epi32(d, _mm256_add_epi32(load(dst + i - 1), one)));
    const unsigned mask = ~static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(same))) & 0xFFu;
    const __m256i found = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&kPositions[mask])));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(breaks + count),
                        _mm256_add_epi32(found, _mm256_set1_epi32(static_cast<int>(i))));
    count += static_cast<size_t>(_mm_popcnt_u32(mask));
  }
  highest.src = std::max(highest.src, highest_lane(high_src));
  highest.dst = std::max(highest.dst, highest_lane(high_dst));
  return count + scan_portable(src, dst, i, end, breaks + count, highest);
}
#endif

ScanFn best_scan() noexcept {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt")) return scan_avx2;
#endif
  return scan_portable;
}

std::vector<Run> scan_runs(const uint32_t* src, const uint32_t* dst, size_t n, ScanFn scan, Highest& highest) {
  std::vector<Run> runs{{src[0], dst[0], 0}};
  std::array<uint32_t, kBlock + kSpare> breaks;
  highest = {src[0], dst[0]};
  uint32_t start = 0;  // of the run that is open
  for (size_t begin = 1; begin < n; begin += kBlock) {
    const size_t found = scan(src, dst, begin, std::min(n, begin + kBlock), breaks.data(), highest);
    const size_t before = runs.size();
    // Room for as many in every block to come: pages are alike all along a list.
    if (before + found > runs.capacity()) runs.reserve(std::min(n, before + found * (1 + (n - begin) / kBlock)));
    runs.resize(before + found);
    Run* const to = runs.data() + before;
    for (size_t k = 0; k < found; ++k) {
      const uint32_t at = breaks[k];
      to[k].src_slot = src[at];
      to[k].dst_slot = dst[at];
      (to + k)[-1].count = at - std::exchange(start, at);
    }
  }
  runs.back().count = static_cast<uint32_t>(n) - start;
  return runs;
}

template <typename T>
void refuse_out_of_range(std::span<const T> pages, size_t i, uint64_t slots, const char* side) {
  throw Error(Code::kInvalid,
              std::string(side) + "_pages[" + std::to_string(i) + "] is " + std::to_string(pages[i]) + ", but the " +
                  (side[0] == 's' ? "source" : "destination") + " layout has " + std::to_string(slots) +
                  " pages: pass page numbers (token slot // page_size) of the pool the layout describes");
}

// The slow half of the bounds check: something is out of range, say what.
template <typename T>
[[noreturn]] void refuse_first(std::span<const T> src, std::span<const T> dst, uint64_t src_slots, uint64_t dst_slots) {
  const auto bad = [](T page, uint64_t slots) { return page < 0 || static_cast<uint64_t>(page) >= slots; };
  for (size_t i = 0; i < src.size(); ++i) {
    if (bad(src[i], src_slots)) refuse_out_of_range(src, i, src_slots, "src");
    if (bad(dst[i], dst_slots)) refuse_out_of_range(dst, i, dst_slots, "dst");
  }
  throw Error(Code::kInternal, "a page was found out of range and then not found again");
}

template <typename T>
[[noreturn]] void refuse_duplicate(std::span<const T> dst) {
  std::unordered_map<T, size_t> seen;
  for (size_t i = 0; i < dst.size(); ++i) {
    const auto [at, fresh] = seen.emplace(dst[i], i);
    if (!fresh)
      throw Error(Code::kInvalid, "dst_pages[" + std::to_string(i) + "] is " + std::to_string(dst[i]) +
                                      ", and so is dst_pages[" + std::to_string(at->second) +
                                      "]: a destination page may be written once (allow_duplicates lifts this)");
  }
  throw Error(Code::kInternal, "destination runs overlap, but no page is named twice");
}

constexpr unsigned kDigitBits = 11;

// Least significant digit first. kDigits of equal width, no wider than kDigitBits.
template <unsigned kDigits>
void radix_sort(std::vector<Run>& runs, unsigned bits) {
  const unsigned width = std::max(1u, (bits + kDigits - 1) / kDigits), mask = (1u << width) - 1;
  std::array<std::array<uint32_t, 1u << kDigitBits>, kDigits> places{};
  for (const Run& run : runs)
    for (unsigned d = 0; d < kDigits; ++d) ++places[d][run.dst_slot >> d * width & mask];
  const auto scratch = std::make_unique_for_overwrite<Run[]>(runs.size());
  Run *from = runs.data(), *to = scratch.get();
  for (unsigned d = 0; d < kDigits; ++d) {
    uint32_t* const place = places[d].data();
    const unsigned shift = d * width;
    uint32_t sum = 0;
    for (size_t i = 0; i <= mask; ++i) sum += std::exchange(place[i], sum);
    for (size_t i = 0; i < runs.size(); ++i) {
      const Run run = from[i];  // a copy: what is written may be anything, for all that the compiler knows
      to[place[run.dst_slot >> shift & mask]++] = run;
    }
    std::swap(from, to);
  }
  if (kDigits % 2 != 0) std::copy_n(from, runs.size(), runs.data());
}

void sort_by_destination(std::vector<Run>& runs, uint32_t highest_dst) {
  const auto bits = static_cast<unsigned>(std::bit_width(highest_dst));
  if (runs.size() < 512)  // below this the histograms cost more than they save
    std::ranges::sort(runs, {}, &Run::dst_slot);
  else if (bits <= kDigitBits)
    radix_sort<1>(runs, bits);
  else if (bits <= 2 * kDigitBits)
    radix_sort<2>(runs, bits);
  else
    radix_sort<3>(runs, bits);
}

bool ascending(const std::vector<Run>& runs) noexcept {
  for (size_t i = 1; i < runs.size(); ++i)
    if (uint64_t{runs[i - 1].dst_slot} + runs[i - 1].count > runs[i].dst_slot) return false;
  return true;
}

// Ascending by destination, merged where both sides continue. False when two runs share a destination page.
bool order(std::vector<Run>& runs, uint32_t highest_dst) {
  sort_by_destination(runs, highest_dst);
  Run open = runs[0];
  Run* to = runs.data();
  for (size_t i = 1; i < runs.size(); ++i) {
    const Run run = runs[i];
    const uint64_t end = uint64_t{open.dst_slot} + open.count;
    if (end > run.dst_slot) return false;
    // One branch for both: a destination often goes on where its source does not, which no processor foresees.
    if ((end == run.dst_slot) & (uint64_t{open.src_slot} + open.count == run.src_slot))
      open.count += run.count;
    else
      *to++ = std::exchange(open, run);
  }
  *to++ = open;
  runs.resize(static_cast<size_t>(to - runs.data()));
  return true;
}

template <typename T>
std::vector<Run> find(std::span<const T> src, std::span<const T> dst, const uint32_t* src32, const uint32_t* dst32,
                      uint64_t src_slots, uint64_t dst_slots, RunOptions options, ScanFn scan) {
  if (src.empty()) return {};
  Highest highest;
  std::vector<Run> runs = scan_runs(src32, dst32, src.size(), scan, highest);
  if (highest.src >= src_slots || highest.dst >= dst_slots) refuse_first(src, dst, src_slots, dst_slots);
  if (!options.allow_duplicates && !ascending(runs) && !order(runs, highest.dst)) refuse_duplicate(dst);
  return runs;
}

void check_lengths(size_t src, size_t dst) {
  if (src != dst)
    throw Error(Code::kInvalid, "src_pages has " + std::to_string(src) + " entries and dst_pages " +
                                    std::to_string(dst) + ": page i of one goes to page i of the other");
  if (src > UINT32_MAX)
    throw Error(Code::kInvalid, "src_pages has " + std::to_string(src) + " entries; one plan takes at most 4294967295");
}

std::vector<Run> find_signed(std::span<const int32_t> src, std::span<const int32_t> dst, uint64_t src_slots,
                             uint64_t dst_slots, RunOptions options, ScanFn scan) {
  check_lengths(src.size(), dst.size());
  // Past 2^31 an unsigned look at a negative page would find it in range.
  constexpr uint64_t kSigned = uint64_t{1} << 31;
  return find(src, dst, reinterpret_cast<const uint32_t*>(src.data()), reinterpret_cast<const uint32_t*>(dst.data()),
              std::min(src_slots, kSigned), std::min(dst_slots, kSigned), options, scan);
}

// The low halves of `pages`; `high` collects every bit above them.
std::unique_ptr<uint32_t[]> narrow(std::span<const int64_t> pages, uint64_t& high) {
  std::unique_ptr<uint32_t[]> out(new uint32_t[pages.size()]);
  for (size_t i = 0; i < pages.size(); ++i) {
    high |= static_cast<uint64_t>(pages[i]) >> 32;
    out[i] = static_cast<uint32_t>(pages[i]);
  }
  return out;
}

}  // namespace

std::vector<Run> find_runs(std::span<const int32_t> src, std::span<const int32_t> dst, uint64_t src_slots,
                           uint64_t dst_slots, RunOptions options) {
  return find_signed(src, dst, src_slots, dst_slots, options, best_scan());
}

std::vector<Run> find_runs_portable(std::span<const int32_t> src, std::span<const int32_t> dst, uint64_t src_slots,
                                    uint64_t dst_slots, RunOptions options) {
  return find_signed(src, dst, src_slots, dst_slots, options, scan_portable);
}

std::vector<Run> find_runs(std::span<const int64_t> src, std::span<const int64_t> dst, uint64_t src_slots,
                           uint64_t dst_slots, RunOptions options) {
  check_lengths(src.size(), dst.size());
  constexpr uint64_t kMost = uint64_t{1} << 32;
  uint64_t high = 0;
  const auto src32 = narrow(src, high), dst32 = narrow(dst, high);
  src_slots = std::min(src_slots, kMost);
  dst_slots = std::min(dst_slots, kMost);
  if (high != 0) refuse_first(src, dst, src_slots, dst_slots);
  return find(src, dst, src32.get(), dst32.get(), src_slots, dst_slots, options, best_scan());
}

}  // namespace pdxfer::plan
