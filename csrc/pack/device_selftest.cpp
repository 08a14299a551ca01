// The device kernel against core's walk; see device_selftest.hpp.
#include "pack/device_selftest.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <new>
#include <random>
#include <utility>
#include <vector>

#include "core/paged_copy.hpp"
#include "pack/checksum.hpp"
#include "pack/device_copier.hpp"
#include "sys/cuda_memory.hpp"
#include "sys/cuda_stream.hpp"

namespace pdxfer::pack {
namespace {

constexpr uint64_t kGuard = 64;  // bytes around and between slots that no copy may touch

struct Case {
  PagedCopy copy;
  uint64_t src_bytes = 0, dst_bytes = 0;
  std::string shape;
};

uint64_t pick(std::mt19937_64& random, uint64_t low, uint64_t high) {
  return std::uniform_int_distribution<uint64_t>(low, high)(random);
}

// Sizes that serving engines have, and odd ones that exercise every alignment and the piece boundary. `large`: enough
// slots for kernels of one or two blocks to hand out their tiles.
Case random_case(std::mt19937_64& random, bool large) {
  static constexpr uint64_t kSizes[] = {1, 3, 16, 72, 127, 576, 1024, 1152, 4095, 4096, 8192, 8193, 16384, 65536 + 48};
  const uint64_t align = uint64_t{1} << pick(random, 0, 4);
  const auto pairs = static_cast<uint32_t>(pick(random, 1, 6));
  const auto slots = static_cast<uint32_t>(large ? pick(random, 500, 1000) : pick(random, 1, 96));
  const size_t sizes = large ? 10 : std::size(kSizes);  // up to 4096
  const bool one_run = pick(random, 0, 5) == 0;         // in pairs without gaps, which kernels take for one slot
  Case made;
  uint64_t src_at = kGuard, dst_at = kGuard;
  for (uint32_t i = 0; i < pairs; ++i) {
    RegionPair p{1, 2, src_at, dst_at, 0, 0, kSizes[pick(random, 0, sizes - 1)]};
    const bool is_dense = one_run || pick(random, 0, 2) == 0;
    const auto up = [&](uint64_t value) { return (value + align - 1) / align * align; };
    p.src_stride = is_dense ? p.slot_bytes : up(p.slot_bytes + pick(random, 0, 200));
    p.dst_stride = is_dense ? p.slot_bytes : up(p.slot_bytes + pick(random, 0, 200));
    p.src_offset += pick(random, 0, 3) * align;
    p.dst_offset += pick(random, 0, 3) * align;
    src_at = p.src_offset + p.src_stride * slots + kGuard;
    dst_at = p.dst_offset + p.dst_stride * slots + kGuard;
    made.copy.pairs.push_back(p);
    made.shape +=
        " " + std::to_string(p.slot_bytes) + "/" + std::to_string(p.src_stride) + "/" + std::to_string(p.dst_stride);
  }
  made.src_bytes = src_at;
  made.dst_bytes = dst_at;
  // Source slots may repeat (a page sent twice); destination slots may not, or order would decide the outcome.
  const uint32_t spare = slots / 8;
  if (one_run)
    made.copy.runs = {
        {static_cast<uint32_t>(pick(random, 0, spare)), static_cast<uint32_t>(pick(random, 0, spare)), slots - spare}};
  for (uint32_t at = 0; !one_run && at < slots;) {
    const auto count = static_cast<uint32_t>(std::min<uint64_t>(pick(random, 1, 9), slots - at));
    if (pick(random, 0, 3) != 0)
      made.copy.runs.push_back({static_cast<uint32_t>(pick(random, 0, slots - count)), at, count});
    at += count;
  }
  std::shuffle(made.copy.runs.begin(), made.copy.runs.end(), random);
  made.copy.seal();
  return made;
}

std::vector<std::byte> random_bytes(std::mt19937_64& random, uint64_t bytes) {
  std::vector<std::byte> data((bytes + 7) / 8 * 8);
  for (size_t i = 0; i < data.size(); i += 8) {
    const uint64_t word = random();
    std::memcpy(&data[i], &word, 8);
  }
  data.resize(bytes);
  return data;
}

}  // namespace

SelfTestResult selftest(uint64_t seed, uint32_t cases, const Mover& move) {
  std::mt19937_64 random(seed);
  SelfTestResult result;
  for (; result.cases < cases && result.failure.empty(); ++result.cases) {
    const bool large = pick(random, 0, 7) == 0;
    const Case made = random_case(random, large);
    const std::vector<std::byte> src = random_bytes(random, made.src_bytes);
    std::vector<std::byte> want = random_bytes(random, made.dst_bytes);  // every byte beside the slots is a guard
    std::vector<std::byte> got = want;
    move(made.copy, src, got, static_cast<unsigned>(pick(random, 1, large ? 2 : 64)));
    for (Cursor at; !at_end(made.copy, at);) {
      const Extent e = next_extent(made.copy, at, UINT64_MAX);
      std::memcpy(want.data() + e.dst_offset, src.data() + e.src_offset, e.bytes);
    }
    const auto differs = std::mismatch(got.begin(), got.end(), want.begin()).first;
    if (differs != got.end())
      result.failure = "case " + std::to_string(result.cases) + " of seed " + std::to_string(seed) + ": byte " +
                       std::to_string(differs - got.begin()) +
                       " of the destination differs; slot bytes/source stride/" +
                       "destination stride of each pair:" + made.shape;
    result.bytes += made.copy.bytes;
  }
  return result;
}

namespace {

// Word by word, by the definition in checksum.hpp.
uint64_t checksum_of_source(const PagedCopy& copy, std::span<const std::byte> src) {
  uint64_t sum = 0, at = 0;
  uint32_t pair = 0;
  for (Cursor cursor; !at_end(copy, cursor);) {
    const Extent e = next_extent(copy, cursor, UINT64_MAX);
    if (std::exchange(pair, e.pair) != e.pair) at = 0;
    for (uint64_t i = 0; i < e.bytes;) {
      uint32_t word = 0;
      const size_t bytes = at % sizeof word == 0 && e.bytes - i >= sizeof word ? sizeof word : 1;
      std::memcpy(&word, &src[e.src_offset + i], bytes);
      sum += checksum_of(pair, at, word);
      i += bytes;
      at += bytes;
    }
  }
  return sum;
}

// A device side of the self-test: one copier, and pieces of random sizes through it.
class DeviceMover {
 public:
  DeviceMover(int ordinal, uint64_t seed) : ordinal_(ordinal), random_(seed) {}

  // Slots to slots or, in every third case, through a contiguous buffer and back. Every other time with checksums: of
  // what was read, and of what then lies at the destination, in other pieces; else the destination is read as soon as
  // the progress says so. Throws Error(kInternal) when one is wrong.
  void move(const PagedCopy& copy, std::span<const std::byte> src, std::span<std::byte> dst, unsigned blocks) {
    DeviceCopyOptions options;
    options.blocks = blocks;
    options.checksum = pick(random_, 0, 1) == 0;
    const sys::PinnedMemory word(sizeof(uint32_t));
    auto* const progress = new (word.data()) uint32_t{0};
    if (!options.checksum) options.progress = progress;
    DeviceCopier copier(ordinal_, options);
    tickets_ = 0;
    const sys::CudaMemory device_src(src), device_dst(dst), buffer(copy.bytes);
    const std::vector<uint64_t> from(copy.pairs.size(), device_src.get()), to(copy.pairs.size(), device_dst.get());
    const auto piece_bytes = [&] {
      return pick(random_, 0, 1) == 0 ? UINT64_MAX : pick(random_, copy.bytes / 256 + 1, copy.bytes / 256 + (1 << 16));
    };
    const uint64_t piece = piece_bytes();
    if (pick(random_, 0, 2) == 0) {
      run(copier, copy, DeviceForm::kGather, from, to, piece, buffer.get());
      run(copier, copy, DeviceForm::kScatter, from, to, piece, buffer.get());
    } else {
      const uint64_t read = run(copier, copy, DeviceForm::kPaged, from, to, piece, 0);
      if (const uint32_t told = std::atomic_ref(*progress).load(); copier.tells() && told != tickets_)
        throw Error(Code::kInternal, "the progress says " + std::to_string(told) + " of " + std::to_string(tickets_) +
                                         " pieces, which are over");
      if (options.checksum) {
        const uint64_t landed = run(copier, copy, DeviceForm::kSum, {}, to, piece_bytes(), 0);
        if (const uint64_t want = checksum_of_source(copy, src); read != want || landed != want)
          throw Error(Code::kInternal, "the device's checksum of what it " +
                                           std::string(read != want ? "copied" : "wrote") + " is wrong, " +
                                           std::to_string(copy.bytes) + " bytes");
      }
    }
    device_dst.read(dst);
  }

 private:
  // Returns the sum of the pieces' checksums.
  uint64_t run(DeviceCopier& copier, const PagedCopy& copy, DeviceForm form, std::span<const uint64_t> from,
               std::span<const uint64_t> to, uint64_t piece, uint64_t buffer) {
    DeviceTables tables = 0;
    check(copier.prepare(copy, form, from, to, tables));
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    DeviceTicket last = tickets_, summed = tickets_;
    uint64_t sum = 0;
    Cursor cursor;
    bool over = false;
    while (!over) {
      DeviceTicket ticket = 0;
      if (!at_end(copy, cursor) && last - summed < DeviceCopyOptions().pieces)
        check(copier.launch(tables, copy, cursor, piece, buffer + position(copy, cursor), ticket));
      if (ticket != 0) last = ticket;
      for (over = true; over && summed < last;) {
        check(copier.done(summed + 1, over));
        if (over) sum += copier.sum(++summed);
      }
      over = over && at_end(copy, cursor);
      if (std::chrono::steady_clock::now() > deadline) throw Error(Code::kTimeout, "a copy took more than 20 s");
    }
    copier.release(tables);
    tickets_ = last;
    return sum;
  }
  static void check(const Status& status) {
    if (!status.ok()) throw Error(status.code, status.to_string(), status.native);
  }

  const int ordinal_;
  std::mt19937_64 random_;
  DeviceTicket tickets_ = 0;  // of the copier in use
};

}  // namespace

SelfTestResult device_selftest(int ordinal, uint64_t seed, uint32_t cases) {
  const sys::CudaContext context(ordinal);
  const sys::CudaScope scope(context);
  DeviceMover mover(ordinal, seed);
  return selftest(seed, cases, [&](const PagedCopy& copy, auto src, auto dst, unsigned blocks) {
    mover.move(copy, src, dst, blocks);
  });
}

}  // namespace pdxfer::pack
