// Cross-memory attach: writing straight into another process's memory with process_vm_writev. Needs nothing of the
// owner's memory, but the right to ptrace it. Worker thread, and the probe at set-up.
#pragma once

#include <array>
#include <memory>
#include <span>
#include <string>

#include "core/paged_copy.hpp"
#include "sys/fd.hpp"

namespace pdxfer::transport::shm {

// What one end shows the other so that it can prove that it reaches the right process: it must read `cookie` at the
// probe's address, and then write the nonce it announces.
struct ProbeArea {
  std::array<uint64_t, 2> cookie{};
  std::array<uint64_t, 2> nonce{};
};

// Tries `area` (an address in process `pid`). 0, or the errno; EBADMSG when another process answers to that pid.
int probe_process(int pid, uint64_t area, const std::array<uint64_t, 2>& cookie,
                  const std::array<uint64_t, 2>& nonce) noexcept;
// Why `error` happened and what to do about it, in a line.
std::string explain_probe(int error);

class CmaWriter {
 public:
  // Throws Error(kUnavailable).
  explicit CmaWriter(int pid);
  // A descriptor that becomes readable when the process ends; -1 when the kernel has none (before Linux 5.3).
  int exit_fd() const noexcept { return pidfd_.get(); }

  // Writes at most `budget` bytes, as many as one system call takes, moves the cursor and tells how many. src[i] is
  // where the source region of pair i begins here, dst[i] where the destination begins in the other process.
  Status write(const PagedCopy& copy, Cursor& cursor, uint64_t budget, std::span<std::byte* const> src,
               std::span<std::byte* const> dst, uint64_t& written) noexcept;

 private:
  struct Vectors;
  int pid_;
  sys::UniqueFd pidfd_;
  std::unique_ptr<Vectors, void (*)(Vectors*)> vectors_;
};

}  // namespace pdxfer::transport::shm
