// process_vm_readv and process_vm_writev; see shm_cma.hpp.
#include "transport/shm/shm_cma.hpp"

#include <poll.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>

namespace pdxfer::transport::shm {
namespace {

constexpr size_t kMaxVectors = 1024;  // IOV_MAX

// Extends the last entry when the bytes follow on, else adds one.
void append(std::array<iovec, kMaxVectors>& list, size_t& count, std::byte* at, uint64_t bytes) noexcept {
  if (count > 0 && static_cast<std::byte*>(list[count - 1].iov_base) + list[count - 1].iov_len == at) {
    list[count - 1].iov_len += bytes;
    return;
  }
  list[count++] = {at, bytes};
}

Status as_status(int error) noexcept {
  switch (error) {
    case EFAULT:
      return {Code::kInvalid, error, "process_vm_writev: memory that is not there"};
    case ESRCH:
      return {Code::kPeerLost, error, "process_vm_writev: the process is gone"};
    default:
      return {Code::kUnavailable, error, "process_vm_writev"};
  }
}

}  // namespace

int probe_process(int pid, uint64_t area, const std::array<uint64_t, 2>& cookie,
                  const std::array<uint64_t, 2>& nonce) noexcept {
  if (pid <= 0) return ESRCH;
  // Read before write: nothing is changed in a process that does not hold the cookie.
  std::array<uint64_t, 2> seen{};
  iovec here{seen.data(), sizeof seen};
  iovec there{reinterpret_cast<void*>(area + offsetof(ProbeArea, cookie)), sizeof seen};
  if (::process_vm_readv(pid, &here, 1, &there, 1, 0) != static_cast<ssize_t>(sizeof seen)) return errno ? errno : EIO;
  if (seen != cookie) return EBADMSG;
  here = {const_cast<uint64_t*>(nonce.data()), sizeof nonce};
  there = {reinterpret_cast<void*>(area + offsetof(ProbeArea, nonce)), sizeof nonce};
  if (::process_vm_writev(pid, &here, 1, &there, 1, 0) != static_cast<ssize_t>(sizeof nonce))
    return errno ? errno : EIO;
  return 0;
}

std::string explain_probe(int error) {
  const std::string text = "process_vm_writev: " + errno_name(error);
  switch (error) {
    case EPERM:
      return text + "; run both as one user, with kernel.yama.ptrace_scope=0 or CAP_SYS_PTRACE (docker --cap-add)";
    case ESRCH:
    case EBADMSG:
      return text + "; the peer is in another pid namespace; share it (docker --pid, shareProcessNamespace)";
    case ENOSYS:
      return text + "; this kernel or sandbox has no cross-memory attach";
    default:
      return text;
  }
}

struct CmaWriter::Vectors {
  std::array<iovec, kMaxVectors> here, there;
};

CmaWriter::CmaWriter(int pid)
    : pid_(pid),
      pidfd_(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0))),
      vectors_(new Vectors, [](Vectors* v) { delete v; }) {}

Status CmaWriter::write(const PagedCopy& copy, Cursor& cursor, uint64_t budget, std::span<std::byte* const> src,
                        std::span<std::byte* const> dst, uint64_t& written) noexcept {
  // The number of a dead process may be given to another one; the descriptor is not.
  if (pidfd_) {
    pollfd exited{pidfd_.get(), POLLIN, 0};
    if (::poll(&exited, 1, 0) != 0) return {Code::kPeerLost, ESRCH, "the process is gone"};
  }
  size_t here = 0, there = 0;
  uint64_t bytes = 0;
  Cursor ahead = cursor;
  while (bytes < budget && !at_end(copy, ahead) && here < kMaxVectors && there < kMaxVectors) {
    const Extent e = next_extent(copy, ahead, budget - bytes);
    append(vectors_->here, here, src[e.pair] + e.src_offset, e.bytes);
    append(vectors_->there, there, dst[e.pair] + e.dst_offset, e.bytes);
    bytes += e.bytes;
  }
  const ssize_t n = ::process_vm_writev(pid_, vectors_->here.data(), here, vectors_->there.data(), there, 0);
  if (n < 0) return as_status(errno);
  if (n == 0 && bytes > 0) return as_status(EFAULT);
  written = static_cast<uint64_t>(n);
  if (static_cast<uint64_t>(n) == bytes)
    cursor = ahead;
  else
    advance(copy, cursor, static_cast<uint64_t>(n));  // stopped at a page that is not there; the next call says so
  return kOkStatus;
}

}  // namespace pdxfer::transport::shm
