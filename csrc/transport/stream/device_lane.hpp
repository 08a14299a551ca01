// DeviceLane: what one io thread needs for device memory: a DeviceCopy per GPU, and pinned slots that payload passes
// through, as many for what it sends as for what it receives. The two never borrow from one another: a receiver's slots
// come free by the GPU alone, so two ends that send to each other cannot wait for each other. Copies are made, and
// slots made and pinned, by the first piece that needs one: whoever only registers device memory pays nothing for them.
//
// Used by the io thread. Owns the memory and the copies; the streams that use them are gone before.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "sys/mapping.hpp"
#include "transport/slot_pool.hpp"
#include "transport/stream/place.hpp"
#include "transport/transport.hpp"

namespace pdxfer::transport::stream {

// A piece of a copy between one GPU's memory and a slot.
struct DeviceWork {
  int device = kHost;
  Cursor cursor;            // of what is not launched yet
  uint64_t bytes = 0;       // of all of it
  uint64_t launched = 0;    // bytes
  DeviceTicket ticket = 0;  // of the last launch
  Status status;

  bool started() const noexcept { return launched == bytes; }
};

class DeviceLane {
 public:
  // `share`: this lane's part of Limits::staging_bytes, per direction.
  DeviceLane(const Context& context, uint64_t share);
  ~DeviceLane();
  DeviceLane(const DeviceLane&) = delete;
  DeviceLane& operator=(const DeviceLane&) = delete;

  // Throws Error(kUnavailable) with the reason.
  void add_device(int ordinal);
  // Likewise, at the first piece. `why` has the whole of what the status says in short.
  Status open(int ordinal, std::string& why) noexcept;
  // Makes the slots, too, and pins them. May be tried again.
  Status open_slots(int ordinal, std::string& why) noexcept;
  // Null when it was not added or opened.
  DeviceCopy* device(int ordinal) const noexcept;

  // Launches what there is room for; again until it is started or its status is not ok. `number` names the copy
  // (next_number); its tables are uploaded by its first piece here and kept while there is room: any others make way,
  // so that no piece waits for another batch's end.
  void start(DeviceWork& work, DeviceForm form, uint64_t number, const PagedCopy& copy,
             const std::vector<Place>& places, std::byte* slot) noexcept;
  // Is all of it over, well or not (its status then says so)?
  bool over(DeviceWork& work) noexcept;
  // Waits until what was launched of it is over, has failed, or the GPU did not answer for seconds (logged: it hangs).
  // Not the data path: revocation and closing.
  void wait(const DeviceWork& work) noexcept;
  void forget(uint64_t number) noexcept;

  SlotPool& outgoing() noexcept { return outgoing_; }
  SlotPool& incoming() noexcept { return incoming_; }
  uint64_t slot_bytes() const noexcept { return slot_bytes_; }  // any thread

 private:
  const DeviceCopyFactory make_;
  const HostPin pin_;
  const uint64_t slot_bytes_;
  const uint32_t slots_;
  sys::Mapping memory_;
  std::shared_ptr<void> pinned_;  // after memory_: unpinned before it goes
  SlotPool outgoing_, incoming_;
  struct Known {
    uint64_t number;
    int device;
    DeviceTables tables;
    uint64_t used;  // when last, by a count of uses
  };
  static constexpr size_t kMostKnown = 64;
  Status tables(int ordinal, DeviceForm form, uint64_t number, const PagedCopy& copy, const std::vector<Place>& places,
                DeviceTables& out) noexcept;
  void evict(size_t index) noexcept;
  std::vector<Known> known_;
  std::vector<uint64_t> addresses_;  // scratch
  uint64_t uses_ = 0;
  std::vector<std::pair<int, std::unique_ptr<DeviceCopy>>> devices_;  // last: pieces under way end first
};

// The size of a staging area's slots, `most` at most, and how many it has.
uint64_t slot_bytes_for(uint64_t most, uint64_t share) noexcept;
uint32_t slots_for(uint64_t share, uint64_t slot_bytes) noexcept;
// A number that no other copy of this process has, never reused.
uint64_t next_number() noexcept;

}  // namespace pdxfer::transport::stream
