// userfaultfd write protection (anonymous memory: Linux 5.7; also of missing pages: 6.4). See userfault.hpp.
#include "sys/userfault.hpp"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>

namespace pdxfer::sys {
namespace {

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif
constexpr uint64_t kWpUnpopulated = 1u << 13;  // UFFD_FEATURE_WP_UNPOPULATED, newer than some headers

// A userfaultfd speaks after one UFFDIO_API; asking for a feature that is missing fails and spoils the descriptor.
bool handshake(int fd, uint64_t features) noexcept {
  uffdio_api api{};
  api.api = UFFD_API;
  api.features = features;
  return ::ioctl(fd, UFFDIO_API, &api) == 0;
}

int open_userfaultfd() noexcept {
  // The full kind also makes system calls of other threads wait (a read(2) into the range); the user-mode kind, which
  // needs no privilege, makes those fail with EFAULT. Both hold back plain stores.
  const int full = static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK));
  if (full >= 0) return full;
  return static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY));
}

}  // namespace

std::optional<WriteFreeze> WriteFreeze::open(std::string& why) {
  for (const bool unpopulated : {true, false}) {
    UniqueFd fd(open_userfaultfd());
    if (!fd) {
      why = "userfaultfd: " + errno_name(errno);
      return std::nullopt;
    }
    if (handshake(fd.get(), UFFD_FEATURE_PAGEFAULT_FLAG_WP | (unpopulated ? kWpUnpopulated : 0)))
      return WriteFreeze(std::move(fd), unpopulated);
  }
  why = "userfaultfd cannot write-protect on this kernel (needs Linux 5.7)";
  return std::nullopt;
}

Status WriteFreeze::freeze(std::byte* address, uint64_t bytes) noexcept {
  // Protection sits in page-table entries. Where the kernel has none for a missing page, a read fault makes one that
  // points to the zero page, which commits no memory.
  if (!unpopulated_ && ::madvise(address, bytes, MADV_POPULATE_READ) != 0)
    return {Code::kUnavailable, errno, "madvise(MADV_POPULATE_READ)"};
  uffdio_register area{};
  area.range.start = reinterpret_cast<uint64_t>(address);
  area.range.len = bytes;
  area.mode = UFFDIO_REGISTER_MODE_WP;
  if (::ioctl(fd_.get(), UFFDIO_REGISTER, &area) != 0) return {Code::kUnavailable, errno, "UFFDIO_REGISTER"};
  uffdio_writeprotect protect{};
  protect.range = area.range;
  protect.mode = UFFDIO_WRITEPROTECT_MODE_WP;
  if (::ioctl(fd_.get(), UFFDIO_WRITEPROTECT, &protect) != 0) {
    const int error = errno;
    thaw(address, bytes);
    return {Code::kUnavailable, error, "UFFDIO_WRITEPROTECT"};
  }
  return kOkStatus;
}

void WriteFreeze::thaw(std::byte* address, uint64_t bytes) noexcept {
  uffdio_range range{reinterpret_cast<uint64_t>(address), bytes};
  // Unregistering lifts what protection is left; on replaced memory it finds nothing of ours and fails, as it should.
  ::ioctl(fd_.get(), UFFDIO_UNREGISTER, &range);
  ::ioctl(fd_.get(), UFFDIO_WAKE, &range);
}

}  // namespace pdxfer::sys
