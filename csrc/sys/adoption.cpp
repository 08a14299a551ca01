// The exchange itself; see adoption.hpp and docs/design/shm.md.
#include "sys/adoption.hpp"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "sys/mapping.hpp"
#include "sys/proc_maps.hpp"

namespace pdxfer::sys {
namespace {

// Writers wait for one chunk's copy at most: about 10 ms.
constexpr uint64_t kChunk = kPopulateChunk;

// Whole pages are read, with whatever else lies in them, while their owners go on writing until they meet the freeze:
// not what sanitizers call a race or an overflow, so neither loop nor system call is one that they watch.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
__attribute__((no_sanitize("address", "thread"), noinline))
#endif
bool all_zero(const std::byte* page, uint64_t bytes) noexcept {
  const auto* word = reinterpret_cast<const volatile uint64_t*>(page);
  const uint64_t words = bytes / sizeof(uint64_t);
  uint64_t seen = 0;
  for (uint64_t i = 0; i < words && seen == 0; i += 8)
    for (uint64_t k = 0; k < 8; ++k) seen |= word[i + k];
  return seen == 0;
}

Status write_all(int memfd, const std::byte* from, uint64_t bytes, uint64_t offset) noexcept {
  while (bytes > 0) {
    const long n = ::syscall(SYS_pwrite64, memfd, from, bytes, offset);
    if (n < 0 && errno == EINTR) continue;
    // Running out of memory is an error here, where storing through a mapping would be SIGBUS.
    if (n <= 0) return {Code::kUnavailable, n < 0 ? errno : EIO, "writing to a memfd"};
    from += n;
    offset += static_cast<uint64_t>(n);
    bytes -= static_cast<uint64_t>(n);
  }
  return kOkStatus;
}

// Pages of zeros are left out: a file's hole reads the same, and memory nobody has used stays uncommitted.
Status copy_used_pages(const std::byte* from, uint64_t bytes, int memfd, uint64_t offset) noexcept {
  const uint64_t page = page_bytes();
  uint64_t begin = 0;  // of the stretch of used pages
  for (uint64_t at = 0; at < bytes; at += page) {
    if (!all_zero(from + at, page)) continue;
    if (at > begin)
      if (const Status s = write_all(memfd, from + begin, at - begin, offset + begin); !s.ok()) return s;
    begin = at + page;
  }
  return begin < bytes ? write_all(memfd, from + begin, bytes - begin, offset + begin) : kOkStatus;
}

Status exchange(std::byte* at, uint64_t bytes, int prot, int memfd, uint64_t offset) noexcept {
  if (const Status s = copy_used_pages(at, bytes, memfd, offset); !s.ok()) return s;
  // One system call unmaps the old pages and maps the new ones under the kernel's lock of the address space: another
  // thread sees either, never neither.
  if (::mmap(at, bytes, prot, MAP_SHARED | MAP_FIXED, memfd, static_cast<off_t>(offset)) == MAP_FAILED)
    return {Code::kUnavailable, errno, "mapping a memfd over private memory"};
  return kOkStatus;
}

}  // namespace

Status adopt_pages(std::byte* address, uint64_t bytes, int prot, int memfd, uint64_t offset,
                   WriteFreeze* freeze) noexcept {
  for (uint64_t done = 0; done < bytes;) {
    const uint64_t chunk = std::min(kChunk, bytes - done);
    std::byte* at = address + done;
    if (freeze)
      if (const Status s = freeze->freeze(at, chunk); !s.ok()) return s;
    const Status status = exchange(at, chunk, prot, memfd, offset + done);
    if (freeze) freeze->thaw(at, chunk);
    if (!status.ok()) return status;
    populate_existing(at, chunk);
    done += chunk;
  }
  return kOkStatus;
}

}  // namespace pdxfer::sys
