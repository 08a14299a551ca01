// RegionTable: the memory registered at this end. Changed by set-up calls on any thread, read by the worker once per
// copy and by io threads once per PLAN, never per extent.
#pragma once

#include <atomic>
#include <mutex>
#include <string>
#include <unordered_map>

#include "core/types.hpp"

namespace pdxfer::transport::stream {

class RegionTable {
 public:
  // `transport` names the caller in errors. Throws Error(kInvalid).
  void add(const Region& region, const char* transport) {
    const std::string what = "register region " + std::to_string(region.id) + " with " + transport;
    if (region.id == kNoId || region.buffer.data == nullptr || region.buffer.bytes == 0)
      throw Error(Code::kInvalid, what + ": it has no id or no bytes");
    const std::lock_guard lock(mutex_);
    if (!regions_.emplace(region.id, region.buffer).second)
      throw Error(Code::kInvalid, what + ": the id is registered already");
  }
  // The region's buffer, which nobody finds any more. Throws Error(kInvalid).
  Buffer remove(RegionId region) {
    const std::lock_guard lock(mutex_);
    const auto found = regions_.find(region);
    if (found == regions_.end())
      throw Error(Code::kInvalid, "deregister region " + std::to_string(region) + ": no such region is registered");
    const Buffer buffer = found->second;
    regions_.erase(found);
    epoch_.fetch_add(1);
    return buffer;
  }
  // An empty buffer when there is no such region.
  Buffer find(RegionId region) const noexcept {
    const std::lock_guard lock(mutex_);
    const auto found = regions_.find(region);
    return found == regions_.end() ? Buffer{} : found->second;
  }
  // Changes whenever a region goes: what was found under an older epoch must be looked up again.
  uint64_t epoch() const noexcept { return epoch_.load(); }

 private:
  mutable std::mutex mutex_;
  std::unordered_map<RegionId, Buffer> regions_;
  std::atomic<uint64_t> epoch_{1};
};

}  // namespace pdxfer::transport::stream
