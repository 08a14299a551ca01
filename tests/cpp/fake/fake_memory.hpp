// The fake driver's memory: memfds mapped at "device addresses", and what handles of them mean in other processes.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>

namespace fake_cuda {

inline constexpr size_t kPiece = 2 << 20;  // of the virtual memory calls

struct Allocation {
  size_t bytes = 0;
  int fd = -1, ordinal = 0;
  bool piece = false;     // made by the virtual memory calls: no IPC handle
  bool imported = false;  // another process's
};

struct MemoryTable {
  std::mutex mutex;
  std::map<uint64_t, Allocation> by_address;
  std::map<uint64_t, size_t> reservations;
  size_t imported = 0;

  // The allocation that holds the address, by_address.end() when none does. With the mutex.
  std::map<uint64_t, Allocation>::iterator find(uint64_t address) {
    auto it = by_address.upper_bound(address);
    if (it == by_address.begin()) return by_address.end();
    --it;
    return address < it->first + it->second.bytes ? it : by_address.end();
  }
};

MemoryTable& memory();
uint64_t map_new(int ordinal, size_t bytes);
void refuse_dmabuf(bool refused);

}  // namespace fake_cuda
