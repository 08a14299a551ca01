// memfd and mmap with errors that say what was asked. See mapping.hpp.
#include "sys/mapping.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <string>
#include <thread>

#include "core/status.hpp"
#include "sys/proc_maps.hpp"

namespace pdxfer::sys {
namespace {

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U
#endif
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

[[noreturn]] void fail(const std::string& what, int error) {
  std::string text = what + ": " + errno_name(error);
  if (error == EMFILE) text += "; raise the limit of open files (ulimit -n)";
  if (error == ENOMEM) text += "; memory or vm.max_map_count is exhausted";
  throw Error(Code::kUnavailable, text, error);
}

// False when this kernel or this kind of memory has no such call. EAGAIN means that somebody holds one of the pages
// just now (a migration, another processor's batch of new ones); what was done before stays done, so trying again is
// cheap.
bool collapse(std::byte* at, uint64_t bytes) noexcept {
  constexpr int kTries = 4;
  for (int tried = 1; ::madvise(at, bytes, MADV_COLLAPSE) != 0; ++tried) {
    if (errno == EINVAL) return false;
    if (errno != EAGAIN || tried == kTries) return true;  // small pages it stays, here
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

}  // namespace

UniqueFd make_memfd(const char* name, uint64_t bytes) {
  constexpr unsigned kFlags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
  UniqueFd fd(::memfd_create(name, kFlags | MFD_NOEXEC_SEAL));
  if (!fd && errno == EINVAL) fd = UniqueFd(::memfd_create(name, kFlags));  // before Linux 6.3
  const std::string what = "shared memory of " + std::to_string(bytes) + " bytes";
  if (!fd) fail(what + ": memfd_create", errno);
  if (::ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0) fail(what + ": ftruncate", errno);
  if (::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0)
    fail(what + ": F_ADD_SEALS", errno);
  return fd;
}

Mapping map_shared(int fd, uint64_t offset, uint64_t bytes) {
  void* at = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, static_cast<off_t>(offset));
  if (at == MAP_FAILED) fail("mapping " + std::to_string(bytes) + " shared bytes", errno);
  return Mapping(static_cast<std::byte*>(at), bytes);
}

Mapping map_memfd(int fd, uint64_t bytes, const char* what) {
  struct stat info {};
  const int seals = ::fcntl(fd, F_GET_SEALS);  // before the size: what it is now, it stays
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0 || ::fstat(fd, &info) != 0 || bytes == 0 ||
      static_cast<uint64_t>(info.st_size) < bytes)
    throw Error(Code::kInvalid, std::string(what) + ": its memory is smaller than it should be, or can become so");
  return map_shared(fd, 0, bytes);
}

Mapping reserve_addresses(uint64_t bytes) {
  void* at = ::mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) fail("reserving " + std::to_string(bytes) + " bytes of addresses", errno);
  return Mapping(static_cast<std::byte*>(at), bytes);
}

void populate_existing(std::byte* address, uint64_t bytes) noexcept {
  std::array<unsigned char, kPopulateChunk / 4096> resident;
  const uint64_t page = page_bytes();
  bytes = std::min(bytes, kPopulateChunk);
  if (::mincore(address, bytes, resident.data()) != 0) return;
  const auto exists = [&](uint64_t at) { return at < bytes && (resident[at / page] & 1) != 0; };
  for (uint64_t at = 0; at < bytes; at += page) {
    const uint64_t begin = at;
    while (exists(at)) at += page;
    if (at > begin) ::madvise(address + begin, at - begin, MADV_POPULATE_READ);
  }
}

void prefer_huge_pages(std::byte* address, uint64_t bytes) noexcept {
  std::array<unsigned char, kPopulateChunk / 4096> resident;
  const uint64_t page = page_bytes();
  const uint64_t lead = (kHugePage - reinterpret_cast<uintptr_t>(address) % kHugePage) % kHugePage;
  if (page != 4096 || bytes < lead + kHugePage) return;
  bytes = (bytes - lead) / kHugePage * kHugePage;
  for (uint64_t done = 0; done < bytes; done += kPopulateChunk) {
    std::byte* const at = address + lead + done;
    const uint64_t chunk = std::min(kPopulateChunk, bytes - done);
    if (::mincore(at, chunk, resident.data()) != 0) continue;
    const auto in_use = [&](uint64_t block) {
      const auto* first = resident.data() + block / page;
      return block < chunk &&
             std::all_of(first, first + kHugePage / page, [](unsigned char p) { return (p & 1) != 0; });
    };
    for (uint64_t block = 0; block < chunk; block += kHugePage) {
      const uint64_t begin = block;
      while (in_use(block)) block += kHugePage;
      // One call for neighbours: each makes the kernel visit every processor once.
      if (block > begin && !collapse(at + begin, block - begin)) return;
    }
  }
}

}  // namespace pdxfer::sys
