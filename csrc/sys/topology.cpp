// GPUs through the driver's table, and the kernel by trying; see topology.hpp.
#include "sys/topology.hpp"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>

#include "core/status.hpp"
#include "shim/cuda.hpp"
#include "sys/fd.hpp"
#include "sys/shared_memory.hpp"
#include "sys/userfault.hpp"

namespace pdxfer::sys {
namespace {

constexpr size_t kPage = 4096;

// Runs in the forked child: only system calls, since other threads' locks were copied as they were.
[[noreturn]] void write_into_parent(pid_t parent, uint64_t* target, int report) noexcept {
  uint64_t value = 42;
  iovec here{&value, sizeof value}, there{target, sizeof value};
  const int error =
      ::process_vm_writev(parent, &here, 1, &there, 1, 0) == static_cast<ssize_t>(sizeof value) ? 0 : errno;
  [[maybe_unused]] const auto written = ::write(report, &error, sizeof error);
  ::_exit(0);
}

Probe probe_process_write() {
  Probe probe{"process_vm_writev", false, ""};
  void* page = ::mmap(nullptr, kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  int ends[2];
  if (page == MAP_FAILED || ::pipe2(ends, O_CLOEXEC) != 0) {
    probe.detail = "could not be tried: " + errno_name(errno);
    return probe;
  }
  const UniqueFd read_end(ends[0]);
  UniqueFd write_end(ends[1]);
  auto* target = static_cast<volatile uint64_t*>(page);
  *target = 0;
  const pid_t parent = ::getpid();
  // The child writes to us, not we to it: with Yama, a parent may touch its child even where strangers may not.
  const pid_t child = ::fork();
  if (child == 0) write_into_parent(parent, static_cast<uint64_t*>(page), write_end.get());
  int error = child < 0 ? errno : ETIMEDOUT;
  write_end.reset();
  if (child > 0) {
    pollfd wait{read_end.get(), POLLIN, 0};
    if (::poll(&wait, 1, 2000) == 1 &&
        ::read(read_end.get(), &error, sizeof error) != static_cast<ssize_t>(sizeof error))
      error = EIO;
    ::kill(child, SIGKILL);
    ::waitpid(child, nullptr, 0);
  }
  probe.works = error == 0 && *target == 42;
  probe.detail = probe.works ? "another process wrote into this one" : errno_name(error == 0 ? EBADMSG : error);
  ::munmap(page, kPage);
  return probe;
}

Probe probe_memfd() {
  Probe probe{"memfd", false, ""};
  const UniqueFd fd(::memfd_create("pdxfer-doctor", MFD_CLOEXEC));
  if (!fd || ::ftruncate(fd.get(), kPage) != 0) {
    probe.detail = "memfd_create: " + errno_name(errno);
    return probe;
  }
  void* page = ::mmap(nullptr, kPage, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
  probe.works = page != MAP_FAILED;
  probe.detail = probe.works ? "mapped" : "mmap: " + errno_name(errno);
  if (probe.works) ::munmap(page, kPage);
  return probe;
}

Probe probe_userfaultfd() {
  Probe probe{"userfaultfd", false, "can hold back writers"};
  std::string why;
  probe.works = WriteFreeze::open(why).has_value();
  if (!probe.works) probe.detail = why;
  return probe;
}

Probe probe_adoption() {
  Probe probe{"adopt", false, "private memory became shared in place"};
  constexpr size_t kBytes = 1 << 20;  // share_memory leaves small pieces alone
  void* page = ::mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (page == MAP_FAILED) {
    probe.detail = "mmap: " + errno_name(errno);
    return probe;
  }
  std::memset(page, 42, kBytes);
  try {
    const SharedView view = share_memory(static_cast<std::byte*>(page), kBytes, Adopt::kWhenSafe);
    probe.works = view.refusal.empty() && !view.segments.empty();
    if (!probe.works) probe.detail = view.refusal;
  } catch (const Error& error) {
    probe.detail = error.what();
  }
  ::munmap(page, kBytes);
  release_vanished();
  return probe;
}

Probe probe_ipv6() {
  Probe probe{"ipv6", false, "::1 can be bound"};
  const UniqueFd fd(::socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in6 here{};
  here.sin6_family = AF_INET6;
  here.sin6_addr = in6addr_loopback;
  probe.works = fd && ::bind(fd.get(), reinterpret_cast<const sockaddr*>(&here), sizeof here) == 0;
  if (!probe.works) probe.detail = "bind ::1: " + errno_name(errno);
  return probe;
}

}  // namespace

std::vector<Gpu> list_gpus() {
  const shim::CudaLibrary& cuda = shim::cuda();
  std::vector<Gpu> gpus;
  if (!cuda.reason.empty()) return gpus;
  for (int ordinal = 0; ordinal < cuda.device_count; ++ordinal) {
    Gpu gpu;
    gpu.ordinal = ordinal;
    shim::CuDevice device = 0;
    shim::cuda_check(cuda.api.device_get(&device, ordinal), "cuDeviceGet");
    const auto attribute = [&](int which) {
      int value = 0;
      shim::cuda_check(cuda.api.device_get_attribute(&value, which, device), "cuDeviceGetAttribute");
      return value;
    };
    char name[256] = {};
    shim::cuda_check(cuda.api.device_get_name(name, sizeof name, device), "cuDeviceGetName");
    size_t bytes = 0;
    shim::cuda_check(cuda.api.device_total_mem(&bytes, device), "cuDeviceTotalMem");
    char pci[32];
    std::snprintf(pci, sizeof pci, "%04x:%02x:%02x.0", static_cast<unsigned>(attribute(shim::kCuAttributePciDomain)),
                  static_cast<unsigned>(attribute(shim::kCuAttributePciBus)),
                  static_cast<unsigned>(attribute(shim::kCuAttributePciDevice)));
    gpu.name = name;
    gpu.bytes = bytes;
    gpu.pci = pci;
    gpu.major = attribute(shim::kCuAttributeMajor);
    gpu.minor = attribute(shim::kCuAttributeMinor);
    gpu.multiprocessors = attribute(shim::kCuAttributeMultiprocessors);
    for (int other = 0; other < cuda.device_count; ++other) {
      shim::CuDevice peer = 0;
      int can = 0;
      if (other != ordinal && cuda.api.device_get(&peer, other) == shim::kCuSuccess &&
          cuda.api.device_can_access_peer(&can, device, peer) == shim::kCuSuccess && can != 0)
        gpu.peers.push_back(other);
    }
    gpus.push_back(std::move(gpu));
  }
  return gpus;
}

std::vector<Probe> probe_kernel() {
  return {probe_process_write(), probe_memfd(), probe_userfaultfd(), probe_adoption(), probe_ipv6()};
}

}  // namespace pdxfer::sys
