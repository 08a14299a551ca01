// Making slots and device copies; see device_lane.hpp.
#include "transport/stream/device_lane.hpp"

#include <algorithm>
#include <atomic>
#include <exception>
#include <string>
#include <thread>

#include "core/log.hpp"
#include "transport/stream/slot_ring.hpp"

namespace pdxfer::transport::stream {
namespace {
constexpr uint64_t kLeastSlot = 64 << 10;
constexpr uint64_t kLeastSlots = 4;  // fewer, and gather, wire and scatter do not overlap
constexpr auto kHung = std::chrono::seconds(10);

}  // namespace

// A piece of a copy fills a slot, unless the share is too small for enough of them.
uint64_t slot_bytes_for(uint64_t most, uint64_t share) noexcept {
  return std::max(std::min(most, share / kLeastSlots) / kLeastSlot * kLeastSlot, kLeastSlot);
}

uint32_t slots_for(uint64_t share, uint64_t slot_bytes) noexcept {
  return static_cast<uint32_t>(std::max(share / slot_bytes, kLeastSlots));
}

DeviceLane::DeviceLane(const Context& context, uint64_t share)
    : make_(context.device_copy),
      pin_(context.pin),
      slot_bytes_(slot_bytes_for(context.limits.chunk_bytes, share)),
      slots_(slots_for(share, slot_bytes_)) {
  known_.reserve(kMostKnown);
}

DeviceLane::~DeviceLane() = default;

void DeviceLane::add_device(int ordinal) {
  if (device(ordinal) != nullptr) return;
  if (!make_ || !pin_)
    throw Error(Code::kUnavailable, "memory of CUDA device " + std::to_string(ordinal) +
                                        " cannot be moved here: this engine has no device copies");
  auto made = make_(ordinal, {});
  addresses_.reserve(1024);
  devices_.emplace_back(ordinal, std::move(made));
}

Status DeviceLane::open(int ordinal, std::string& why) noexcept {
  constexpr const char* kWhat = "copies of a GPU cannot be made; explain() says why";
  try {
    add_device(ordinal);
    return kOkStatus;
  } catch (const Error& error) {
    why = error.what();
    return error.at(kWhat);
  } catch (const std::exception& error) {
    why = error.what();
    return {Code::kUnavailable, 0, kWhat};
  }
}

Status DeviceLane::open_slots(int ordinal, std::string& why) noexcept {
  if (const Status s = open(ordinal, why); !s.ok() || memory_) return s;
  try {
    const uint64_t direction = slots_ * slot_bytes_;
    sys::Mapping memory = sys::map_memfd(sys::make_memfd("pdxfer-slots", 2 * direction).get(), 2 * direction, "slots");
    if (const Status s = pin_slots(pin_, ordinal, memory, pinned_, why); !s.ok()) return s;
    memory_ = std::move(memory);
    outgoing_ = SlotPool(memory_.data(), slot_bytes_, slots_);
    incoming_ = SlotPool(memory_.data() + direction, slot_bytes_, slots_);
    return kOkStatus;
  } catch (const std::exception& error) {
    why = error.what();
    return {Code::kUnavailable, 0, "no memory for staging slots: lower staging_bytes; explain() says why"};
  }
}

DeviceCopy* DeviceLane::device(int ordinal) const noexcept {
  for (const auto& [number, copy] : devices_)
    if (number == ordinal) return copy.get();
  return nullptr;
}

Status DeviceLane::tables(int ordinal, DeviceForm form, uint64_t number, const PagedCopy& copy,
                          const std::vector<Place>& places, DeviceTables& out) noexcept {
  for (Known& known : known_)
    if (known.number == number && known.device == ordinal) {
      known.used = ++uses_;
      out = known.tables;
      return kOkStatus;
    }
  addresses_.clear();
  for (const Place& place : places) addresses_.push_back(reinterpret_cast<uint64_t>(place.base));
  const std::span<const uint64_t> here(addresses_), none;
  const auto oldest = [&] {
    return static_cast<size_t>(std::ranges::min_element(known_, {}, &Known::used) - known_.begin());
  };
  if (known_.size() >= kMostKnown) evict(oldest());
  for (;;) {
    const bool gather = form == DeviceForm::kGather;
    const Status s = device(ordinal)->prepare(copy, form, gather ? here : none, gather ? none : here, out);
    if (!s.ok()) return s;
    if (out != 0) {
      known_.push_back({number, ordinal, out, ++uses_});
      return s;
    }
    if (known_.empty()) return s;
    evict(oldest());
  }
}

void DeviceLane::evict(size_t index) noexcept {
  device(known_[index].device)->release(known_[index].tables);
  known_.erase(known_.begin() + static_cast<ptrdiff_t>(index));
}

void DeviceLane::forget(uint64_t number) noexcept {
  for (size_t i = known_.size(); i > 0; --i)
    if (known_[i - 1].number == number) evict(i - 1);
}

uint64_t next_number() noexcept {
  static std::atomic<uint64_t> last{0};
  return ++last;
}

void DeviceLane::start(DeviceWork& work, DeviceForm form, uint64_t number, const PagedCopy& copy,
                       const std::vector<Place>& places, std::byte* slot) noexcept {
  DeviceCopy* const with = device(work.device);
  if (with == nullptr) {
    work.status = {Code::kInternal, 0, "an io thread knows no such GPU"};
    return;
  }
  DeviceTables prepared = 0;
  work.status = tables(work.device, form, number, copy, places, prepared);
  if (prepared == 0) return;
  while (work.status.ok() && !work.started()) {
    const Cursor before = work.cursor;
    DeviceTicket ticket = 0;
    work.status = with->launch(prepared, copy, work.cursor, work.bytes - work.launched,
                               reinterpret_cast<uint64_t>(slot + work.launched), ticket);
    if (ticket == 0) return;  // no room, or failed
    work.ticket = ticket;
    work.launched += bytes_between(copy, before, work.cursor);
  }
}

bool DeviceLane::over(DeviceWork& work) noexcept {
  if (work.ticket == 0) return !work.status.ok();
  bool over = false;
  const Status moved = device(work.device)->done(work.ticket, over);
  if (moved.ok() && !over) return false;
  if (work.status.ok()) work.status = moved;
  return work.started() || !work.status.ok();
}

void DeviceLane::wait(const DeviceWork& work) noexcept {
  if (work.ticket == 0) return;
  const auto start = Clock::now();
  for (bool over = false; device(work.device)->done(work.ticket, over).ok() && !over;) {
    const auto waited = Clock::now() - start;
    if (waited > kHung) return log(LogLevel::kError, "a GPU did not finish a copy in 10 s: it hangs");
    if (waited > std::chrono::microseconds(200)) std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
}

}  // namespace pdxfer::transport::stream
