// What this machine has: GPUs as the driver lists them, and what its kernel lets a process do, found by trying.
// Called by doctor on the caller's thread; owns nothing after it returned.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace pdxfer::sys {

struct Gpu {
  int ordinal = 0;
  std::string name;
  int major = 0, minor = 0;  // compute capability
  int multiprocessors = 0;
  uint64_t bytes = 0;
  std::string pci;         // "0000:1b:00.0", as /sys/bus/pci/devices names it
  std::vector<int> peers;  // ordinals whose memory this one can map
};

// Empty when shim::cuda() has a reason. Throws Error(kUnavailable) when the driver fails on a device that it listed.
std::vector<Gpu> list_gpus();

// One thing tried. `detail`: what happened, with the error by name when it failed.
struct Probe {
  std::string name;
  bool works = false;
  std::string detail;
};

// "process_vm_writev" (as a process that is not our child's parent sees it), "memfd", "userfaultfd", "adopt" (private
// memory made shared in place), "ipv6" (loopback). Each bounded in time; none leaves anything behind.
std::vector<Probe> probe_kernel();

}  // namespace pdxfer::sys
