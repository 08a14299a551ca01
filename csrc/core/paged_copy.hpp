// Walking a PagedCopy: the one place that knows canonical order, used by the host copy, by every transport that
// unrolls extents, and by both ends of the wire. Header-only because it is the inside of every hot loop.
#pragma once

#include <algorithm>
#include <span>

#include "core/types.hpp"

namespace pdxfer {

// Do slots of this pair lie back to back on both sides, so that a run is one extent?
inline bool dense(const RegionPair& p) noexcept { return p.src_stride == p.slot_bytes && p.dst_stride == p.slot_bytes; }

inline bool at_end(const PagedCopy& copy, const Cursor& cursor) noexcept {
  return cursor.pair >= copy.pairs.size() || copy.runs.empty();
}

// One piece that is contiguous on both sides; offsets are from each region's first byte.
struct Extent {
  uint32_t pair = 0;
  uint64_t src_offset = 0, dst_offset = 0, bytes = 0;
};

// The extent at `cursor`, at most `budget` bytes of it, and the cursor moved past it. Requires !at_end and budget > 0.
inline Extent next_extent(const PagedCopy& copy, Cursor& cursor, uint64_t budget) noexcept {
  const RegionPair& p = copy.pairs[cursor.pair];
  const Run& r = copy.runs[cursor.run];
  Extent e{cursor.pair, p.src_offset + (uint64_t{r.src_slot} + cursor.slot) * p.src_stride + cursor.byte,
           p.dst_offset + (uint64_t{r.dst_slot} + cursor.slot) * p.dst_stride + cursor.byte, 0};
  if (dense(p)) {
    const uint64_t done = cursor.slot * p.slot_bytes + cursor.byte;
    const uint64_t rest = r.count * p.slot_bytes - done;
    if (rest <= budget) {  // the common case, kept free of the division
      e.bytes = rest;
      cursor.slot = r.count;
      cursor.byte = 0;
    } else {
      e.bytes = budget;
      cursor.slot = static_cast<uint32_t>((done + budget) / p.slot_bytes);
      cursor.byte = (done + budget) % p.slot_bytes;
    }
  } else {
    e.bytes = std::min(budget, p.slot_bytes - cursor.byte);
    cursor.byte += e.bytes;
    if (cursor.byte == p.slot_bytes) {
      cursor.byte = 0;
      ++cursor.slot;
    }
  }
  if (cursor.slot == r.count) {
    cursor.slot = 0;
    if (++cursor.run == copy.runs.size()) {
      cursor.run = 0;
      ++cursor.pair;
    }
  }
  return e;
}

// Up to `count` extents of one pair from `cursor` on, as long as each is whole, at most `most` bytes, and together at
// most `budget`: take(src_offset, dst_offset, bytes) is called for each and the cursor moved past them. Returns how
// many; 0 when the next one is not of that kind. The same as next_extent, without its bookkeeping for each: small pages
// are copied in the time that takes.
template <class Take>
inline size_t take_small_extents(const PagedCopy& copy, Cursor& cursor, uint64_t budget, uint64_t most, size_t count,
                                 Take&& take) noexcept {
  if (at_end(copy, cursor) || cursor.byte != 0) return 0;
  const RegionPair p = copy.pairs[cursor.pair];
  const std::span runs(copy.runs);
  uint32_t run = cursor.run, slot = cursor.slot;
  size_t taken = 0;
  if (dense(p)) {
    for (; slot == 0 && taken < count && run < runs.size(); ++run, ++taken) {
      const uint64_t bytes = runs[run].count * p.slot_bytes;
      if (bytes > most || bytes > budget) break;
      budget -= bytes;
      take(p.src_offset + runs[run].src_slot * p.src_stride, p.dst_offset + runs[run].dst_slot * p.dst_stride, bytes);
    }
  } else {
    for (; taken < count && run < runs.size() && p.slot_bytes <= std::min(most, budget); ++taken) {
      budget -= p.slot_bytes;
      take(p.src_offset + (uint64_t{runs[run].src_slot} + slot) * p.src_stride,
           p.dst_offset + (uint64_t{runs[run].dst_slot} + slot) * p.dst_stride, p.slot_bytes);
      if (++slot == runs[run].count) slot = 0, ++run;
    }
  }
  cursor.slot = slot;
  cursor.run = run;
  if (run == runs.size()) cursor.run = 0, ++cursor.pair;
  return taken;
}

// Move the cursor `bytes` further: whole pairs in one step each, then whole runs. Stops at the end of the copy, or
// where pair `pair_end` begins; returns how far it came. Requires seal().
inline uint64_t advance(const PagedCopy& copy, Cursor& cursor, uint64_t bytes,
                        uint32_t pair_end = UINT32_MAX) noexcept {
  const uint64_t wanted = bytes;
  while (bytes > 0 && cursor.pair < pair_end && !at_end(copy, cursor)) {
    const RegionPair& p = copy.pairs[cursor.pair];
    if (cursor == Cursor{cursor.pair, 0, 0, 0} && bytes >= copy.slots * p.slot_bytes) {
      bytes -= copy.slots * p.slot_bytes;
      ++cursor.pair;
      continue;
    }
    if (copy.slots == copy.runs.size()) {  // every run is one slot, so this is arithmetic
      const uint64_t step = std::min(bytes, (copy.slots - cursor.run) * p.slot_bytes - cursor.byte);
      const uint64_t now = cursor.byte + step;
      bytes -= step;
      cursor.run += static_cast<uint32_t>(now / p.slot_bytes);
      cursor.byte = now % p.slot_bytes;
      if (cursor.run == copy.runs.size()) cursor.run = 0, ++cursor.pair;
      continue;
    }
    const Run& r = copy.runs[cursor.run];
    const uint64_t done = cursor.slot * p.slot_bytes + cursor.byte;
    if (done == 0 && bytes >= r.count * p.slot_bytes) {  // the common case, kept free of the division
      bytes -= r.count * p.slot_bytes;
      if (++cursor.run == copy.runs.size()) cursor.run = 0, ++cursor.pair;
      continue;
    }
    const uint64_t step = std::min(bytes, r.count * p.slot_bytes - done);
    const uint64_t now = done + step;
    bytes -= step;
    cursor.slot = static_cast<uint32_t>(now / p.slot_bytes);
    cursor.byte = now % p.slot_bytes;
    if (cursor.slot == r.count) {
      cursor.slot = 0;
      if (++cursor.run == copy.runs.size()) {
        cursor.run = 0;
        ++cursor.pair;
      }
    }
  }
  return wanted - bytes;
}

// Bytes of the copy before the cursor. O(pairs + runs). Requires seal().
inline uint64_t position(const PagedCopy& copy, const Cursor& cursor) noexcept {
  uint64_t bytes = 0, slots = cursor.slot;
  for (uint32_t i = 0; i < cursor.pair && i < copy.pairs.size(); ++i) bytes += copy.slots * copy.pairs[i].slot_bytes;
  if (at_end(copy, cursor)) return bytes;
  if (copy.slots == copy.runs.size())
    slots += cursor.run;
  else
    for (uint32_t i = 0; i < cursor.run; ++i) slots += copy.runs[i].count;
  return bytes + slots * copy.pairs[cursor.pair].slot_bytes + cursor.byte;
}

// The bytes from one cursor to a later one. Requires seal(). O(pairs + runs).
inline uint64_t bytes_between(const PagedCopy& copy, const Cursor& from, const Cursor& to) noexcept {
  return position(copy, to) - position(copy, from);
}

enum class Side : uint8_t { kSrc, kDst };

// Does one side of every pair stay inside a region of `bytes(region id)` bytes (0: unknown region)?
// O(pairs); overflow-safe, so it may be fed from the wire. Requires seal().
template <typename BytesOf>
Status check_range(const PagedCopy& copy, Side side, BytesOf&& bytes_of) noexcept {
  const uint64_t end = side == Side::kSrc ? copy.src_slot_end : copy.dst_slot_end;
  for (const RegionPair& p : copy.pairs) {
    const uint64_t offset = side == Side::kSrc ? p.src_offset : p.dst_offset;
    const uint64_t stride = side == Side::kSrc ? p.src_stride : p.dst_stride;
    const uint64_t have = bytes_of(side == Side::kSrc ? p.src : p.dst);
    if (have == 0) return {Code::kInvalid, 0, "unknown region"};
    if (p.slot_bytes == 0 || p.slot_bytes > stride) return {Code::kInvalid, 0, "slot larger than its stride"};
    if (end == 0) continue;
    uint64_t last = 0, past = 0;
    if (__builtin_mul_overflow(end - 1, stride, &last) || __builtin_add_overflow(last, offset, &past) ||
        __builtin_add_overflow(past, p.slot_bytes, &past) || past > have)
      return {Code::kInvalid, 0,
              side == Side::kSrc ? "source slot outside its region" : "destination slot outside its region"};
  }
  return kOkStatus;
}

}  // namespace pdxfer
