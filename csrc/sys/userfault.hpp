// WriteFreeze: holds back every writer of a range of private anonymous memory while its pages are exchanged.
// Used by shared_memory during adoption, on the registering thread; owns a userfaultfd. Reads go on undisturbed; a
// thread that writes sleeps in its page fault until thaw() and then continues on whatever is mapped there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "core/status.hpp"
#include "sys/fd.hpp"

namespace pdxfer::sys {

class WriteFreeze {
 public:
  // Nothing when this kernel or this process's permissions do not allow it; `why` then says so in a line.
  static std::optional<WriteFreeze> open(std::string& why);

  // From the return on, no byte of [address, address + bytes) changes (page aligned, private anonymous, one or more
  // areas). Not ok: nothing is frozen.
  Status freeze(std::byte* address, uint64_t bytes) noexcept;
  // Wake who waits; harmless for memory that was replaced or never frozen.
  void thaw(std::byte* address, uint64_t bytes) noexcept;

 private:
  WriteFreeze(UniqueFd fd, bool unpopulated) noexcept : fd_(std::move(fd)), unpopulated_(unpopulated) {}
  UniqueFd fd_;
  bool unpopulated_;  // the kernel also holds back the first write to pages that do not exist yet
};

}  // namespace pdxfer::sys
