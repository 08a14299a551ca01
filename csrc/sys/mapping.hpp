// Mapping: the one owner of a range of mmapped addresses; make_memfd: anonymous shared memory with a fixed size.
// Used by shm's set-up; any thread, one at a time per object.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <utility>

#include "sys/fd.hpp"

namespace pdxfer::sys {

class Mapping {
 public:
  Mapping() noexcept = default;
  Mapping(std::byte* data, uint64_t bytes) noexcept : data_(data), bytes_(bytes) {}
  Mapping(Mapping&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}
  Mapping& operator=(Mapping&& other) noexcept {
    if (this != &other) {
      reset();
      data_ = std::exchange(other.data_, nullptr);
      bytes_ = other.bytes_;
    }
    return *this;
  }
  ~Mapping() { reset(); }

  std::byte* data() const noexcept { return data_; }
  uint64_t bytes() const noexcept { return data_ ? bytes_ : 0; }
  explicit operator bool() const noexcept { return data_ != nullptr; }
  void reset() noexcept {
    if (data_) ::munmap(data_, bytes_);
    data_ = nullptr;
  }

 private:
  std::byte* data_ = nullptr;
  uint64_t bytes_ = 0;
};

// A memfd of exactly `bytes`, sealed so that no holder can change its size: whoever maps it after checking the size
// never meets SIGBUS. Throws Error(kUnavailable) with the errno.
UniqueFd make_memfd(const char* name, uint64_t bytes);
// Throws Error(kUnavailable). `offset` is page aligned.
Mapping map_shared(int fd, uint64_t offset, uint64_t bytes);
// The first `bytes` of what make_memfd made, here or in a peer, whose word counts for nothing: using what a peer can
// shrink could be SIGBUS. Throws Error(kInvalid) naming `what` when it is smaller or can become so; as map_shared.
Mapping map_memfd(int fd, uint64_t bytes, const char* what);
// Addresses without memory behind them, to be covered piece by piece. Throws Error(kUnavailable).
Mapping reserve_addresses(uint64_t bytes);

// Enter the pages of a shared mapping that exist already into this process's page tables, at most one chunk of 32 MiB,
// so that using them does not fault; pages nobody has used stay uncommitted. Best effort. Allocates nothing.
inline constexpr uint64_t kPopulateChunk = 32 << 20;
void populate_existing(std::byte* address, uint64_t bytes) noexcept;

// The size and alignment that a huge page has on x86-64 and, with 4 KiB pages, on arm64.
inline constexpr uint64_t kHugePage = 2 << 20;

// Give those parts of the range that are in use huge pages, whether shared or private: random pages cost a look-up in
// the page tables each, which 2 MiB entries make rare. Contents and addresses stay; memory nobody has used stays
// uncommitted; pages that a device has pinned are left alone by the kernel. Best effort (Linux 6.1): where the kernel
// refuses, memory is as it was. For memory in use only, and before peers map it.
void prefer_huge_pages(std::byte* address, uint64_t bytes) noexcept;

}  // namespace pdxfer::sys
