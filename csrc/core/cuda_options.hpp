// CudaOptions: Config::cuda taken apart, "sm_budget=16,path=map,copy_engine=off". Pure; called by Config::validate and
// by whoever moves device memory.
#pragma once

#include <cstdint>
#include <string_view>

namespace pdxfer {

struct CudaOptions {
  enum class Path : uint8_t { kAuto, kMap, kStaging };

  uint32_t sm_budget = 0;   // thread blocks of a copy at most, each on a multiprocessor of its own; 0: measured default
  Path path = Path::kAuto;  // how the peer's device memory is reached: mapped, or staged through pinned host memory
  bool copy_engine = true;  // long contiguous runs by the copy engine
  bool checksum = false;    // of every mapped batch, computed by its copy and compared where it landed

  // Throws Error(kInvalid) naming the option.
  static CudaOptions parse(std::string_view text);
};

}  // namespace pdxfer
