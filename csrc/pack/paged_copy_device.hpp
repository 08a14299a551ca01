// DevicePagedCopy: a PagedCopy moved by the kernel pdx_paged_copy in one launch. Used by the thread that owns the
// device's work; holds the device's primary context and the loaded module.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "core/types.hpp"
#include "pack/paged_copy_args.hpp"

namespace pdxfer::pack {

// The pairs and runs as the kernel reads them. src[i] and dst[i]: where pair i's regions begin in the device's address
// space. The copy is sealed and checked against the regions by the caller.
struct DeviceTables {
  std::vector<DevicePair> pairs;
  std::vector<DeviceRun> runs;
  uint64_t slots = 0, pieces = 0;
};
DeviceTables device_tables(const PagedCopy& copy, std::span<const uint64_t> src, std::span<const uint64_t> dst);

class DevicePagedCopy {
 public:
  // Loads the image for the device. Throws Error(kUnavailable): no driver, no such device, no image that serves it.
  explicit DevicePagedCopy(int ordinal);
  ~DevicePagedCopy();
  DevicePagedCopy(const DevicePagedCopy&) = delete;
  DevicePagedCopy& operator=(const DevicePagedCopy&) = delete;

  // Copies all of it and returns when the bytes are there. Allocates for the tables: set-up and tests, not the data
  // path. blocks: thread blocks to launch. Throws Error.
  void run(const DeviceTables& tables, unsigned blocks);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace pdxfer::pack
