// Which files of shared memory lie behind a range of this process's addresses, making it so where it is not yet.
// Used by shm's register_memory; any thread (one lock inside). docs/design/shm.md tells why each rule is there.
//
// Memory that is already MAP_SHARED is only looked up. Private anonymous memory is *adopted*: its pages are exchanged
// in place for those of a memfd, at the same addresses, with the same contents, while writers are held back. Adopted
// memory stays shared after the region is gone; its memfd is let go when nothing maps it any more.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "sys/fd.hpp"

namespace pdxfer::sys {

struct SharedFile {
  UniqueFd fd;  // open for reading and writing
  dev_t dev = 0;
  ino_t inode = 0;
};

// `bytes` at `address` are the file's from `offset` on; all page aligned.
struct Segment {
  std::byte* address = nullptr;
  uint64_t bytes = 0, offset = 0;
  std::shared_ptr<const SharedFile> file;
};

enum class Adopt : uint8_t {
  kNever,     // only look up what is shared already
  kWhenSafe,  // and adopt, unless a device may have pinned pages of this process or writers cannot be held back
  kAlways,    // and adopt even so: the caller vouches that nobody writes or has pinned the memory
};

struct SharedView {
  std::vector<Segment> segments;  // in order of address, without gaps, covering whole pages; empty: not shared
  std::string refusal;            // then: why, in one line
};

// Throws Error(kInvalid) when a part of the range is not mapped at all; any other obstacle is a refusal, and the memory
// then has the contents it had.
SharedView share_memory(std::byte* data, uint64_t bytes, Adopt adopt);

// Let go of memfds whose memory the program has unmapped; share_memory does it too. Returns how many are left that no
// view refers to, and whose memory is therefore worth watching.
size_t release_vanished() noexcept;

// How many adopted memfds are held, for tests and describe().
size_t adopted_files() noexcept;

}  // namespace pdxfer::sys
