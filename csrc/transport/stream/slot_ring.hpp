// SlotRing: pinned slots that two processes of one machine share, so that device memory passes between them without a
// copy on a CPU: the sender's GPU gathers into a slot, a SLOT frame names it, the receiver's GPU scatters from the same
// slot, and a CREDIT frame gives it back. Each end makes the ring that it fills and maps the other's.
//
// Made at set-up; costs addresses only until an end pins, which is when the first piece of device memory passes.
// Afterwards its stream's io thread only. The other end is trusted for what slots hold and for nothing else.
#pragma once

#include <memory>
#include <vector>

#include "sys/fd.hpp"
#include "sys/mapping.hpp"
#include "transport/slot_pool.hpp"
#include "transport/transport.hpp"

namespace pdxfer::transport::stream {

// What an end gives the other: the memory of the ring that it fills.
struct SlotRingEnd {
  sys::UniqueFd memory;
  uint64_t slot_bytes = 0;
  uint32_t slots = 0;

  static SlotRingEnd make(const Limits& limits);  // throws Error(kUnavailable)
};

class SlotRing {
 public:
  // Throws Error(kInvalid) when `theirs` is not what it says, kUnavailable when it cannot be mapped.
  SlotRing(SlotRingEnd mine, SlotRingEnd theirs, HostPin pin);
  SlotRing(const SlotRing&) = delete;
  SlotRing& operator=(const SlotRing&) = delete;

  // Page-locks a direction for the GPUs of this process, once. kUnavailable with the driver's code; `why` then says all
  // of it. May be tried again.
  Status pin_outgoing(int device, std::string& why) noexcept { return pin(out_, device, why); }
  Status pin_incoming(int device, std::string& why) noexcept { return pin(in_, device, why); }

  // Ours. A slot is taken, filled, lent, and given back by the other end's CREDIT.
  SlotPool& outgoing() noexcept { return pool_; }
  void lend(uint32_t slot) noexcept { lent_[slot] = true; }
  bool repaid(uint32_t slot) noexcept;  // false when it was not lent

  // Theirs. borrow: false when there is no such slot, when it is held already, or when it has not so many bytes.
  // Whoever reads it holds it once more; the last to let go returns it.
  bool borrow(uint32_t slot, uint64_t bytes) noexcept;
  void hold(uint32_t slot) noexcept { ++holders_[slot]; }
  bool let_go(uint32_t slot) noexcept { return --holders_[slot] == 0; }
  std::byte* incoming(uint32_t slot) const noexcept { return in_.memory.data() + slot * in_slot_bytes_; }

 private:
  struct Direction {
    sys::Mapping memory;
    std::shared_ptr<void> pinned;  // after memory: unpinned before it goes
  };
  static Direction map(const SlotRingEnd& end);
  Status pin(Direction& direction, int device, std::string& why) const noexcept;

  const HostPin pin_;
  Direction out_, in_;
  SlotPool pool_;
  std::vector<bool> lent_;
  const uint64_t in_slot_bytes_;
  std::vector<uint32_t> holders_;  // of each incoming slot: what still reads it
};

// Page-locks `memory` by `pin`. A failure is typed, with the driver's code, and `why` has the reason and the next step.
Status pin_slots(const HostPin& pin, int device, const sys::Mapping& memory, std::shared_ptr<void>& pinned,
                 std::string& why) noexcept;

}  // namespace pdxfer::transport::stream
