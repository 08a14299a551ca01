// See region_table.hpp.
#include "engine/region_table.hpp"

#include <algorithm>
#include <cstdio>

namespace pdxfer::engine {
namespace {

uint64_t address(const Region& region) { return reinterpret_cast<uint64_t>(region.buffer.data); }

std::string range_text(const Region& region) {
  char text[64];
  std::snprintf(text, sizeof text, "[0x%llx, +%llu bytes)", static_cast<unsigned long long>(address(region)),
                static_cast<unsigned long long>(region.buffer.bytes));
  return text;
}

}  // namespace

void RegionTable::add(const Region& region) {
  const uint64_t begin = address(region);
  uint64_t end = 0;
  if (begin == 0 || region.buffer.bytes == 0 || __builtin_add_overflow(begin, region.buffer.bytes, &end))
    throw Error(Code::kInvalid, "cannot register memory " + range_text(region) + ": it is null, empty or wraps around");
  {
    std::lock_guard lock(mutex_);
    auto after = by_address_.lower_bound(begin);
    const Region* clash = nullptr;
    if (after != by_address_.end() && after->first < end) clash = &by_id_.at(after->second);
    if (after != by_address_.begin()) {
      const Region& before = by_id_.at(std::prev(after)->second);
      if (address(before) + before.buffer.bytes > begin) clash = &before;
    }
    if (clash != nullptr)
      throw Error(Code::kInvalid, "cannot register memory " + range_text(region) + ": it overlaps region " +
                                      std::to_string(clash->id) + " " + range_text(*clash) +
                                      "; deregister that one, or register the whole range once");
    if (!by_id_.emplace(region.id, region).second)
      throw Error(Code::kInvalid, "region id " + std::to_string(region.id) + " is in use already");
    by_address_.emplace(begin, region.id);
    sizes_.insert(std::ranges::lower_bound(sizes_, region.id, {}, &Size::id), {region.id, region.buffer.bytes});
  }
  added_.notify_all();
}

bool RegionTable::remove(RegionId id) {
  std::lock_guard lock(mutex_);
  const auto it = by_id_.find(id);
  if (it == by_id_.end()) return false;
  by_address_.erase(address(it->second));
  by_id_.erase(it);
  sizes_.erase(std::ranges::lower_bound(sizes_, id, {}, &Size::id));
  return true;
}

std::optional<Region> RegionTable::get(RegionId id) const {
  std::lock_guard lock(mutex_);
  const auto it = by_id_.find(id);
  return it == by_id_.end() ? std::nullopt : std::optional(it->second);
}

std::optional<Region> RegionTable::find(uint64_t pointer, uint64_t bytes, std::chrono::milliseconds wait) const {
  const auto look = [&]() -> std::optional<Region> {
    auto after = by_address_.upper_bound(pointer);
    if (after == by_address_.begin()) return std::nullopt;
    const Region& region = by_id_.at(std::prev(after)->second);
    const uint64_t into = pointer - address(region);
    if (into > region.buffer.bytes || bytes > region.buffer.bytes - into) return std::nullopt;
    return region;
  };
  const auto deadline = std::chrono::steady_clock::now() + wait;
  std::unique_lock lock(mutex_);
  for (;;) {
    if (auto region = look(); region || closed_) return region;
    if (added_.wait_until(lock, deadline) == std::cv_status::timeout) return look();
  }
}

std::vector<Region> RegionTable::all() const {
  std::lock_guard lock(mutex_);
  std::vector<Region> regions;
  regions.reserve(by_id_.size());
  for (const auto& [id, region] : by_id_) regions.push_back(region);
  return regions;
}

size_t RegionTable::size() const {
  std::lock_guard lock(mutex_);
  return by_id_.size();
}

// A submit comes long after the last one, with everything out of the caches: a walk of a tree per pair would then cost
// more than the plan. Pairs mostly name regions in the order of their ids.
Status RegionTable::check(const TransferPlan& plan, Side side) const {
  std::lock_guard lock(mutex_);
  size_t next = 0;
  const auto bytes_of = [&](RegionId id) -> uint64_t {
    if (next >= sizes_.size() || sizes_[next].id != id)
      next = static_cast<size_t>(std::ranges::lower_bound(sizes_, id, {}, &Size::id) - sizes_.begin());
    return next < sizes_.size() && sizes_[next].id == id ? sizes_[next++].bytes : 0;
  };
  for (const PagedCopy& copy : plan.copies)
    if (const Status status = check_range(copy, side, bytes_of); !status.ok()) return status;
  return kOkStatus;
}

void RegionTable::close() {
  {
    std::lock_guard lock(mutex_);
    closed_ = true;
  }
  added_.notify_all();
}

}  // namespace pdxfer::engine
