// Memory and plans of the conformance suite: regions with guard bytes, random factorised plans, and an oracle that
// knows what the destination must look like afterwards. Single-threaded; owned by the test that makes it.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "core/paged_copy.hpp"
#include "transport/transport.hpp"

namespace conformance {

using namespace pdxfer;
using Random = std::mt19937_64;

inline uint64_t pick(Random& random, uint64_t low, uint64_t high) {
  return std::uniform_int_distribution<uint64_t>(low, high)(random);
}

inline constexpr size_t kGuard = 256;

// Where the suite's memory is: the host's, or a fake device's that the CPU can read as well.
struct MemoryKind {
  int device = kHost;
  std::byte* (*allocate)(size_t bytes) = [](size_t bytes) { return new std::byte[bytes]; };
  void (*release)(std::byte* memory) = [](std::byte* memory) { delete[] memory; };
};
inline MemoryKind memory_kind;
// What a region of this number is in; a test file that mixes kinds sets it before its cases run.
inline MemoryKind (*memory_kind_of)(RegionId) = [](RegionId) { return memory_kind; };

// Which regions are memory of a GPU; a test file of device memory sets it before its cases run. What stands for a GPU's
// memory is host memory at addresses that no processor instruction can use (fake_device_copy.hpp takes the tag off).
inline int (*device_of)(RegionId) = [](RegionId) { return kHost; };
inline constexpr uint64_t kDeviceTag = 1ull << 60;

// A region between two guards, with a copy of what all of it should hold.
class Memory {
 public:
  Memory(RegionId id, uint64_t bytes, uint64_t seed) : Memory(memory_kind_of(id), id, bytes, seed) {}
  Memory(const MemoryKind& kind, RegionId id, uint64_t bytes, uint64_t seed)
      : size_(bytes + 2 * kGuard), storage_(kind.allocate(size_), kind.release), region_{id, {}} {
    Random random(seed);
    for (size_t at = 0; at < size_; at += sizeof(uint64_t)) {
      const uint64_t word = random();
      std::memcpy(storage_.get() + at, &word, std::min(sizeof word, size_ - at));
    }
    expect_present();
    const int tagged = device_of(id);
    const auto address = reinterpret_cast<uint64_t>(data()) + (tagged == kHost ? 0 : kDeviceTag);
    region_.buffer = {reinterpret_cast<std::byte*>(address), bytes, tagged == kHost ? kind.device : tagged};
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  const Region& region() const { return region_; }
  RegionId id() const { return region_.id; }
  uint64_t bytes() const { return region_.buffer.bytes; }
  std::byte* data() { return storage_.get() + kGuard; }
  std::byte* expected_data() { return expected.data() + kGuard; }
  bool as_expected() const { return std::equal(expected.begin(), expected.end(), storage_.get()); }
  void expect_present() { expected.assign(storage_.get(), storage_.get() + size_); }
  void fill(std::byte value) {
    std::fill_n(data(), bytes(), value);
    expect_present();
  }

  std::vector<std::byte> expected;

 private:
  size_t size_;
  std::unique_ptr<std::byte[], void (*)(std::byte*)> storage_;
  Region region_;
};

using Memories = std::vector<std::unique_ptr<Memory>>;
using MemoryList = std::vector<Memory*>;

inline Memory* find(Memories& memories, RegionId id) {
  for (auto& m : memories)
    if (m->id() == id) return m.get();
  return nullptr;
}

// What the destination must become: slot by slot, from the definition, sharing no code with the walk under test.
inline void expect_plan(const TransferPlan& plan, Memories& from, Memories& to) {
  for (const PagedCopy& copy : plan.copies)
    for (const RegionPair& p : copy.pairs)
      for (const Run& r : copy.runs)
        for (uint64_t i = 0; i < r.count; ++i)
          std::memcpy(find(to, p.dst)->expected_data() + p.dst_offset + (r.dst_slot + i) * p.dst_stride,
                      find(from, p.src)->data() + p.src_offset + (r.src_slot + i) * p.src_stride, p.slot_bytes);
}

struct Shape {
  uint64_t pairs = 1, slots = 1, slot_bytes = 1;
  bool padded = false;  // strides larger than slots
  uint64_t longest_run = 1;
};

// One copy of `shape`, whose slots lie anywhere in the regions: a random part of the slots, each destination once.
inline PagedCopy random_copy(Random& random, const Shape& shape, const MemoryList& from, const MemoryList& to) {
  PagedCopy copy;
  uint64_t src_slots = UINT64_MAX, dst_slots = UINT64_MAX;
  for (uint64_t i = 0; i < shape.pairs; ++i) {
    Memory& src = *from[i % from.size()];
    // Pairs of one copy write disjoint parts of the destination, or a later one would overwrite an earlier one.
    Memory& dst = *to[i % to.size()];
    const uint64_t parts = (shape.pairs + to.size() - 1) / to.size();
    const uint64_t part = dst.bytes() / parts;
    RegionPair p;
    p.src = src.id();
    p.dst = dst.id();
    p.slot_bytes = shape.slot_bytes;
    p.src_stride = p.slot_bytes + (shape.padded ? pick(random, 0, p.slot_bytes) : 0);
    p.dst_stride = p.slot_bytes + (shape.padded ? pick(random, 0, p.slot_bytes) : 0);
    p.src_offset = pick(random, 0, 64);
    p.dst_offset = i / to.size() * part + pick(random, 0, 64);
    src_slots = std::min(src_slots, (src.bytes() - p.src_offset) / p.src_stride);
    dst_slots = std::min(dst_slots, (part - 64) / p.dst_stride);
    copy.pairs.push_back(p);
  }
  const uint64_t want = std::min({shape.slots, src_slots, dst_slots});
  std::vector<bool> used(dst_slots, false);
  uint64_t done = 0;
  for (int attempt = 0; done < want && attempt < 100000; ++attempt) {
    Run r;
    r.count = static_cast<uint32_t>(pick(random, 1, std::min(shape.longest_run, want - done)));
    r.src_slot = static_cast<uint32_t>(pick(random, 0, src_slots - r.count));
    r.dst_slot = static_cast<uint32_t>(pick(random, 0, dst_slots - r.count));
    bool free = true;
    for (uint32_t i = 0; i < r.count; ++i) free = free && !used[r.dst_slot + i];
    if (!free) continue;
    for (uint32_t i = 0; i < r.count; ++i) used[r.dst_slot + i] = true;
    copy.runs.push_back(r);
    done += r.count;
  }
  copy.seal();
  return copy;
}

// `part` of `parts` of dst, from the front of src: batches in flight together must not write the same bytes.
inline PagedCopy part_copy(Memory& src, Memory& dst, uint64_t slot_bytes, uint64_t part, uint64_t parts) {
  const uint64_t bytes = dst.bytes() / parts;
  PagedCopy copy;
  copy.pairs.push_back({src.id(), dst.id(), 0, part * bytes, slot_bytes, slot_bytes, slot_bytes});
  copy.runs.push_back({0, 0, static_cast<uint32_t>(std::min(src.bytes(), bytes) / slot_bytes)});
  copy.seal();
  return copy;
}

inline PagedCopy whole_copy(Memory& src, Memory& dst, uint64_t slot_bytes) {
  return part_copy(src, dst, slot_bytes, 0, 1);
}

// The injected host copy: the definition again, through the walk of core/.
inline uint64_t host_copy(const PagedCopy& copy, Cursor& cursor, uint64_t budget, std::span<std::byte* const> src,
                          std::span<std::byte* const> dst) {
  uint64_t done = 0;
  while (done < budget && !at_end(copy, cursor)) {
    const Extent e = next_extent(copy, cursor, budget - done);
    std::memcpy(dst[e.pair] + e.dst_offset, src[e.pair] + e.src_offset, e.bytes);
    done += e.bytes;
  }
  return done;
}

}  // namespace conformance
