// What /proc says about this process's memory: its VMAs, and what the process holds that may have pinned pages.
// Used by shared_memory at registration, by the fork handler and by tests; any thread; owns nothing.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <vector>

namespace pdxfer::sys {

struct VmArea {
  uintptr_t begin = 0, end = 0;
  int prot = 0;  // PROT_READ | PROT_WRITE | PROT_EXEC
  bool shared = false;
  uint64_t offset = 0;  // of `begin` in the file
  dev_t dev = 0;
  ino_t inode = 0;   // 0: anonymous
  std::string path;  // "[heap]", "/memfd:x (deleted)", empty for plain anonymous memory

  uint64_t bytes() const noexcept { return end - begin; }
};

// The areas that intersect [begin, end), in order of address. One pass over /proc/self/maps, whose text the kernel
// makes without touching page tables. Throws Error(kUnavailable) when /proc is not mounted.
std::vector<VmArea> read_maps(uintptr_t begin = 0, uintptr_t end = UINTPTR_MAX);

// Is any page of [begin, end) locked (mlock), kept from children (MADV_DONTFORK), or device memory? Reads
// /proc/self/smaps, which costs a walk of the page tables, so it first asks whether the process locks memory at all.
bool has_locked_memory(uintptr_t begin, uintptr_t end);

// Empty, or the first open descriptor whose kernel object may have pinned user pages: "fd 7 is /dev/nvidia0".
std::string find_pinning_descriptor();

// "/proc/self/map_files/<begin>-<end>" of an area.
std::string map_files_path(const VmArea& area);

uint64_t page_bytes() noexcept;

}  // namespace pdxfer::sys
