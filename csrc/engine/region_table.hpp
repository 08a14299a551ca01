// RegionTable: the regions of one engine (its own) or those that one peer published. Any thread; one short lock.
#pragma once

#include <chrono>
#include <condition_variable>
#include <map>
#include <mutex>
#include <optional>

#include "core/paged_copy.hpp"
#include "core/types.hpp"

namespace pdxfer::engine {

class RegionTable {
 public:
  // Throws Error(kInvalid) when the range is empty, wraps, or overlaps a region that is there already.
  void add(const Region& region);
  // False when there is no such region.
  bool remove(RegionId id);
  std::optional<Region> get(RegionId id) const;
  // The region that holds [pointer, pointer + bytes); waits up to `wait` for one to be added.
  std::optional<Region> find(uint64_t pointer, uint64_t bytes, std::chrono::milliseconds wait) const;
  std::vector<Region> all() const;
  size_t size() const;
  // core's range check of one side of every copy of a plan.
  Status check(const TransferPlan& plan, Side side) const;
  // Nothing is added any more: waiters give up.
  void close();

 private:
  struct Size {
    RegionId id;
    uint64_t bytes;
  };

  mutable std::mutex mutex_;
  mutable std::condition_variable added_;
  std::map<RegionId, Region> by_id_;
  std::map<uint64_t, RegionId> by_address_;
  std::vector<Size> sizes_;  // of all regions, by id: what check() reads, on every submit
  bool closed_ = false;
};

}  // namespace pdxfer::engine
