// Mapping and pinning; see slot_ring.hpp.
#include "transport/stream/slot_ring.hpp"

#include <algorithm>
#include <string>
#include <utility>

#include "transport/stream/device_lane.hpp"

namespace pdxfer::transport::stream {
namespace {
// Two slots for each of gather, hand-over and scatter would do; more only costs pinned memory, of every pair of
// engines. A launch takes some microseconds beside 19 a MiB on PCIe 5, so slots are larger than chunks.
constexpr uint64_t kMostRing = 32 << 20;
constexpr uint64_t kMostSlot = 4 << 20;
constexpr uint32_t kMostSlots = 1 << 16;
constexpr uint64_t kMostBytes = 1ull << 40;
}  // namespace

SlotRingEnd SlotRingEnd::make(const Limits& limits) {
  const uint64_t share = std::min(limits.staging_bytes, kMostRing);
  SlotRingEnd end;
  end.slot_bytes = slot_bytes_for(kMostSlot, share);
  end.slots = slots_for(share, end.slot_bytes);
  end.memory = sys::make_memfd("pdxfer-slot-ring", end.slots * end.slot_bytes);
  return end;
}

SlotRing::Direction SlotRing::map(const SlotRingEnd& end) {
  constexpr const char* kWhat = "a ring of slots";
  if (end.slots > kMostSlots || end.slot_bytes > kMostBytes / kMostSlots)
    throw Error(Code::kInvalid, std::string(kWhat) + " is larger than any should be");
  return {sys::map_memfd(end.memory.get(), end.slots * end.slot_bytes, kWhat), nullptr};
}

SlotRing::SlotRing(SlotRingEnd mine, SlotRingEnd theirs, HostPin pin)
    : pin_(std::move(pin)),
      out_(map(mine)),
      in_(map(theirs)),
      pool_(out_.memory.data(), mine.slot_bytes, mine.slots),
      lent_(mine.slots, false),
      in_slot_bytes_(theirs.slot_bytes),
      holders_(theirs.slots, 0) {}

Status SlotRing::pin(Direction& direction, int device, std::string& why) const noexcept {
  const bool done = direction.pinned.use_count() > 0;  // what is pinned need not be a pointer
  return done ? kOkStatus : pin_slots(pin_, device, direction.memory, direction.pinned, why);
}

bool SlotRing::repaid(uint32_t slot) noexcept {
  if (slot >= lent_.size() || !lent_[slot]) return false;
  lent_[slot] = false;
  return pool_.give(slot);
}

bool SlotRing::borrow(uint32_t slot, uint64_t bytes) noexcept {
  if (slot >= holders_.size() || holders_[slot] != 0 || bytes == 0 || bytes > in_slot_bytes_) return false;
  holders_[slot] = 1;
  return true;
}

Status pin_slots(const HostPin& pin, int device, const sys::Mapping& memory, std::shared_ptr<void>& pinned,
                 std::string& why) noexcept {
  constexpr const char* kWhat = "staging memory cannot be page-locked: lower staging_bytes; explain() says why";
  try {
    if (!pin) throw Error(Code::kUnavailable, "this engine has no device copies");
    pinned = pin(device, memory.data(), memory.bytes());
    return kOkStatus;
  } catch (const Error& error) {
    why = "page-locking " + std::to_string(memory.bytes() >> 20) + " MiB of staging memory failed (" + error.what() +
          "): lower staging_bytes, or let the process lock more (ulimit -l, the container's memory limit)";
    return {Code::kUnavailable, error.status().native, kWhat, error.status().native_name};
  } catch (const std::exception&) {
    why = "no memory to page-lock staging memory";
    return {Code::kUnavailable, 0, kWhat};
  }
}

}  // namespace pdxfer::transport::stream
