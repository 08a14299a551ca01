// Memory calls of the fake driver; see fake_cuda.hpp.
#include "fake_memory.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <string>

#include "fake_cuda.hpp"
#include "fake_tables.hpp"

namespace fake_cuda {
namespace {

using namespace pdxfer::shim;
constexpr CuResult kInvalidContext = 201, kPeerUnsupported = 217, kNotSupported = 801;
std::atomic<bool> refused{false}, dmabuf_refused{false};

struct Handle {
  int pid = 0, fd = 0;
  uint64_t bytes = 0, inode = 0;
};

uint64_t map_fd(int fd, size_t bytes, void* at = nullptr) {
  void* address = ::mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | (at != nullptr ? MAP_FIXED : 0), fd, 0);
  return address == MAP_FAILED ? 0 : reinterpret_cast<uint64_t>(address);
}

int new_fd(size_t bytes) {
  const int fd = ::memfd_create("fake-cuda", MFD_CLOEXEC);
  return ::ftruncate(fd, static_cast<off_t>(bytes)) == 0 ? fd : -1;
}

CuResult pointer_attributes(unsigned count, int* names, void** values, CuDevicePtr pointer) {
  MemoryTable& table = memory();
  const std::lock_guard lock(table.mutex);
  const auto it = table.find(pointer);
  for (unsigned i = 0; i < count; ++i) {
    if (names[i] == kCuPointerAttributeMemoryType)
      *static_cast<unsigned*>(values[i]) = it == table.by_address.end() ? 0 : 2;
    if (names[i] == kCuPointerAttributeDeviceOrdinal)
      *static_cast<int*>(values[i]) = it == table.by_address.end() ? -2 : it->second.ordinal;
  }
  return kCuSuccess;
}

CuResult address_range(CuDevicePtr* base, size_t* bytes, CuDevicePtr pointer) {
  MemoryTable& table = memory();
  const std::lock_guard lock(table.mutex);
  const auto it = table.find(pointer);
  if (it == table.by_address.end()) return kCuInvalidValue;
  *base = it->first;
  *bytes = it->second.bytes;
  return kCuSuccess;
}

CuResult ipc_get(CuIpcHandle* out, CuDevicePtr pointer) {
  MemoryTable& table = memory();
  const std::lock_guard lock(table.mutex);
  const auto it = table.find(pointer);
  if (it == table.by_address.end() || it->second.piece || it->second.imported) return kCuInvalidValue;
  struct stat info {};
  ::fstat(it->second.fd, &info);
  const Handle handle{::getpid(), it->second.fd, it->second.bytes, info.st_ino};
  std::memset(out, 0, sizeof *out);
  std::memcpy(out, &handle, sizeof handle);
  return kCuSuccess;
}

CuResult ipc_open(CuDevicePtr* out, CuIpcHandle in, unsigned) {
  Handle handle;
  std::memcpy(static_cast<void*>(&handle), &in, sizeof handle);
  if (refused) return kPeerUnsupported;
  if (handle.pid == ::getpid()) return kInvalidContext;
  const std::string path = "/proc/" + std::to_string(handle.pid) + "/fd/" + std::to_string(handle.fd);
  const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  struct stat info {};
  if (fd < 0 || ::fstat(fd, &info) != 0 || info.st_ino != handle.inode) {
    if (fd >= 0) ::close(fd);
    return kCuInvalidValue;
  }
  MemoryTable& table = memory();
  const std::lock_guard lock(table.mutex);
  const uint64_t at = map_fd(fd, handle.bytes);
  table.by_address[at] = {handle.bytes, fd, 0, false, true};
  ++table.imported;
  *out = at;
  return kCuSuccess;
}

CuResult free_memory(CuDevicePtr pointer) {
  MemoryTable& table = memory();
  const std::lock_guard lock(table.mutex);
  const auto it = table.by_address.find(pointer);
  if (it == table.by_address.end()) return kCuInvalidValue;
  if (it->second.imported) --table.imported;
  ::munmap(reinterpret_cast<void*>(it->first), it->second.bytes);
  ::close(it->second.fd);
  table.by_address.erase(it);
  return kCuSuccess;
}

// A handle of the virtual memory calls is a descriptor of its own, and the inode tells whether two mean the same.
CuResult vmm_retain(CuMemHandle* out, void* address) {
  MemoryTable& table = memory();
  const std::lock_guard lock(table.mutex);
  const auto it = table.find(reinterpret_cast<uint64_t>(address));
  if (it == table.by_address.end() || !it->second.piece) return kCuInvalidValue;
  *out = static_cast<CuMemHandle>(it->second.fd) + 1;
  return kCuSuccess;
}
CuResult vmm_export(void* out, CuMemHandle handle, int, unsigned long long) {
  *static_cast<int*>(out) = ::fcntl(static_cast<int>(handle - 1), F_DUPFD_CLOEXEC, 0);
  return kCuSuccess;
}
CuResult vmm_import(CuMemHandle* out, void* shareable, int) {
  if (refused) return kPeerUnsupported;
  *out =
      static_cast<CuMemHandle>(::fcntl(static_cast<int>(reinterpret_cast<intptr_t>(shareable)), F_DUPFD_CLOEXEC, 0)) +
      (1ull << 32) + 1;
  return kCuSuccess;
}
CuResult vmm_release(CuMemHandle handle) {
  if (handle >> 32 != 0) ::close(static_cast<int>((handle & 0xffffffff) - 1));
  return kCuSuccess;
}
CuResult vmm_reserve(CuDevicePtr* out, size_t bytes, size_t, CuDevicePtr, unsigned long long) {
  void* at = ::mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  *out = reinterpret_cast<uint64_t>(at);
  return at == MAP_FAILED ? 2 : kCuSuccess;
}
CuResult vmm_free(CuDevicePtr at, size_t bytes) {
  return ::munmap(reinterpret_cast<void*>(at), bytes) == 0 ? kCuSuccess : kCuInvalidValue;
}
CuResult vmm_map(CuDevicePtr at, size_t bytes, size_t, CuMemHandle handle, unsigned long long) {
  MemoryTable& table = memory();
  const std::lock_guard lock(table.mutex);
  const int fd = ::fcntl(static_cast<int>((handle & 0xffffffff) - 1), F_DUPFD_CLOEXEC, 0);
  struct stat info {};
  if (::fstat(fd, &info) != 0 || static_cast<size_t>(info.st_size) != bytes) return kCuInvalidValue;
  map_fd(fd, bytes, reinterpret_cast<void*>(at));
  table.by_address[at] = {bytes, fd, 0, true, true};
  ++table.imported;
  return kCuSuccess;
}
CuResult vmm_unmap(CuDevicePtr at, size_t bytes) {
  MemoryTable& table = memory();
  const std::lock_guard lock(table.mutex);
  for (auto it = table.by_address.lower_bound(at); it != table.by_address.end() && it->first < at + bytes;) {
    ::close(it->second.fd);
    --table.imported;
    it = table.by_address.erase(it);
  }
  ::mmap(reinterpret_cast<void*>(at), bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  return kCuSuccess;
}

// Whole pages that are mapped from end to end, by as many pieces as it takes.
CuResult range_handle(void* out, CuDevicePtr begin, size_t bytes, int type, unsigned long long) {
  constexpr uint64_t kPage = 4096;
  if (dmabuf_refused) return kNotSupported;
  if (type != kCuRangeHandleDmaBuf || bytes == 0 || begin % kPage != 0 || bytes % kPage != 0) return kCuInvalidValue;
  MemoryTable& table = memory();
  const std::lock_guard lock(table.mutex);
  for (uint64_t at = begin; at < begin + bytes;) {
    const auto it = table.find(at);
    if (it == table.by_address.end()) return kCuInvalidValue;
    at = it->first + (it->second.bytes + kPage - 1) / kPage * kPage;
  }
  const DmabufContent content{begin, bytes};
  const int fd = ::memfd_create("fake-dma-buf", MFD_CLOEXEC);
  if (::write(fd, &content, sizeof content) != static_cast<ssize_t>(sizeof content)) return kCuInvalidValue;
  *static_cast<int*>(out) = fd;
  return kCuSuccess;
}

}  // namespace

MemoryTable& memory() {
  static auto* const table = new MemoryTable;
  return *table;
}

uint64_t map_new(int ordinal, size_t bytes) {
  MemoryTable& table = memory();
  const std::lock_guard lock(table.mutex);
  const int fd = new_fd(bytes);
  const uint64_t at = map_fd(fd, bytes);
  table.by_address[at] = {bytes, fd, ordinal, false, false};
  return at;
}

std::byte* allocate(int ordinal, size_t bytes) { return reinterpret_cast<std::byte*>(map_new(ordinal, bytes)); }
void release(std::byte* at) { free_memory(reinterpret_cast<uint64_t>(at)); }

std::byte* allocate_pieces(int ordinal, size_t pieces) {
  CuDevicePtr at = 0;
  vmm_reserve(&at, pieces * kPiece, 0, 0, 0);
  MemoryTable& table = memory();
  const std::lock_guard lock(table.mutex);
  for (size_t i = 0; i < pieces; ++i) {
    const int fd = new_fd(kPiece);
    map_fd(fd, kPiece, reinterpret_cast<void*>(at + i * kPiece));
    table.by_address[at + i * kPiece] = {kPiece, fd, ordinal, true, false};
  }
  return reinterpret_cast<std::byte*>(at);
}
void release_pieces(std::byte* memory_at, size_t pieces) {
  const auto at = reinterpret_cast<uint64_t>(memory_at);
  MemoryTable& table = memory();
  const std::lock_guard lock(table.mutex);
  for (size_t i = 0; i < pieces; ++i) {
    ::close(table.by_address.at(at + i * kPiece).fd);
    table.by_address.erase(at + i * kPiece);
  }
  ::munmap(memory_at, pieces * kPiece);
}

size_t mappings() {
  const std::lock_guard lock(memory().mutex);
  return memory().imported;
}
void refuse_mapping(bool now) { refused = now; }
void refuse_dmabuf(bool now) { dmabuf_refused = now; }

void fill_memory_table(CudaDriver& api) {
  api.pointer_get_attributes = &pointer_attributes;
  api.mem_address_range = &address_range;
  api.ipc_get_handle = &ipc_get;
  api.ipc_open_handle = &ipc_open;
  api.ipc_close_handle = &free_memory;
  api.mem_free = &free_memory;
  api.vmm_retain = &vmm_retain;
  api.vmm_release = &vmm_release;
  api.vmm_export = &vmm_export;
  api.vmm_import = &vmm_import;
  api.vmm_reserve = &vmm_reserve;
  api.vmm_free = &vmm_free;
  api.vmm_map = &vmm_map;
  api.vmm_unmap = &vmm_unmap;
  api.mem_range_handle = &range_handle;
  api.vmm_set_access = [](CuDevicePtr, size_t, const CuMemAccess*, size_t) { return kCuSuccess; };
  api.host_alloc = [](void** out, size_t bytes, unsigned) {
    *out = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    const std::lock_guard lock(memory().mutex);
    memory().reservations[reinterpret_cast<uint64_t>(*out)] = bytes;
    return kCuSuccess;
  };
  api.host_free = [](void* at) {
    const std::lock_guard lock(memory().mutex);
    const auto it = memory().reservations.find(reinterpret_cast<uint64_t>(at));
    ::munmap(at, it->second);
    memory().reservations.erase(it);
    return kCuSuccess;
  };
  api.host_register = [](void*, size_t, unsigned) { return kCuSuccess; };
  api.host_unregister = [](void*) { return kCuSuccess; };
  api.host_device_pointer = [](CuDevicePtr* out, void* host, unsigned) {
    *out = reinterpret_cast<uint64_t>(host);
    return kCuSuccess;
  };
}

}  // namespace fake_cuda
