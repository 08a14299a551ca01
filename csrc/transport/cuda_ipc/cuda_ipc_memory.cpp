// See cuda_ipc_memory.hpp.
#include "transport/cuda_ipc/cuda_ipc_memory.hpp"

#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "core/log.hpp"

namespace pdxfer::transport::cuda_ipc {
namespace {

constexpr uint64_t kGranularity = 2 << 20;  // of the driver's virtual memory calls on every device so far
constexpr size_t kMaxPieces = 6000;

void report(shim::CuResult result, const char* what) noexcept {
  if (result != shim::kCuSuccess) log(LogLevel::kWarning, what);
}

class MappedHandle final : public Mapped {
 public:
  MappedHandle(std::shared_ptr<const sys::CudaContext> context, const shim::CuIpcHandle& handle)
      : context_(std::move(context)) {
    const sys::CudaScope scope(*context_);
    shim::CuDevicePtr at = 0;
    shim::cuda_check(shim::cuda().api.ipc_open_handle(&at, handle, shim::kCuIpcLazyPeerAccess),
                     "cuIpcOpenMemHandle of the peer's memory");
    address = at;
  }
  ~MappedHandle() override {
    const shim::CudaDriver& api = shim::cuda().api;
    shim::CuContext popped = nullptr;
    if (api.context_push(context_->get()) != shim::kCuSuccess) return;
    report(api.ipc_close_handle(address), "cuIpcCloseMemHandle failed");
    api.context_pop(&popped);
  }

 private:
  const std::shared_ptr<const sys::CudaContext> context_;
};

// The driver opens an allocation once per process and device, so all links share what is open. Opening and closing are
// under one lock: nobody meets a mapping that is about to end.
struct Opened {
  struct Use {
    std::unique_ptr<MappedHandle> mapping;
    size_t users = 0;
  };
  std::mutex mutex;
  std::map<std::pair<std::string, int>, Use> by_handle;
};
Opened& opened() {
  static auto* const process_wide = new Opened;  // never destroyed: links may outlive main's statics
  return *process_wide;
}

class SharedHandle final : public Mapped {
 public:
  SharedHandle(std::shared_ptr<const sys::CudaContext> context, const shim::CuIpcHandle& handle)
      : name_(std::string(handle.bytes, sizeof handle.bytes), context->device()) {
    const std::lock_guard lock(opened().mutex);
    const auto found = opened().by_handle.find(name_);
    if (found == opened().by_handle.end()) {
      auto mapping = std::make_unique<MappedHandle>(std::move(context), handle);
      address = mapping->address;
      opened().by_handle.emplace(name_, Opened::Use{std::move(mapping), 1});
    } else {
      address = found->second.mapping->address;
      ++found->second.users;
    }
  }
  ~SharedHandle() override {
    const std::lock_guard lock(opened().mutex);
    const auto found = opened().by_handle.find(name_);
    if (--found->second.users == 0) opened().by_handle.erase(found);
  }

 private:
  const std::pair<std::string, int> name_;
};

class MappedPieces final : public Mapped {
 public:
  MappedPieces(std::shared_ptr<const sys::CudaContext> context, const Key& key,
               const std::vector<sys::UniqueFd>& pieces)
      : context_(std::move(context)) {
    const sys::CudaScope scope(*context_);
    const shim::CudaDriver& api = shim::cuda().api;
    for (const uint64_t bytes : key.pieces) bytes_ += bytes;
    shim::CuDevicePtr at = 0;
    shim::cuda_check(api.vmm_reserve(&at, bytes_, 0, 0, 0), "cuMemAddressReserve");
    address = at;
    try {
      for (size_t i = 0; i < pieces.size(); ++i) map(pieces[i].get(), key.pieces[i]);
      const shim::CuMemAccess access{{shim::kCuLocationDevice, context_->device()}, shim::kCuAccessReadWrite};
      shim::cuda_check(api.vmm_set_access(at, bytes_, &access, 1), "cuMemSetAccess to the peer's memory");
    } catch (...) {
      unmap();
      throw;
    }
  }
  ~MappedPieces() override {
    const shim::CudaDriver& api = shim::cuda().api;
    shim::CuContext popped = nullptr;
    if (api.context_push(context_->get()) != shim::kCuSuccess) return;
    unmap();
    api.context_pop(&popped);
  }

 private:
  void map(int fd, uint64_t bytes) {
    const shim::CudaDriver& api = shim::cuda().api;
    shim::CuMemHandle handle = 0;
    void* const shareable = reinterpret_cast<void*>(static_cast<intptr_t>(fd));
    shim::cuda_check(api.vmm_import(&handle, shareable, shim::kCuHandlePosixFd), "cuMemImportFromShareableHandle");
    const shim::CuResult result = api.vmm_map(address + mapped_, bytes, 0, handle, 0);
    report(api.vmm_release(handle), "cuMemRelease failed");  // the mapping holds it
    shim::cuda_check(result, "cuMemMap of the peer's memory");
    mapped_ += bytes;
  }
  void unmap() noexcept {
    const shim::CudaDriver& api = shim::cuda().api;
    if (mapped_ > 0) report(api.vmm_unmap(address, mapped_), "cuMemUnmap failed");
    report(api.vmm_free(address, bytes_), "cuMemAddressFree failed");
  }

  const std::shared_ptr<const sys::CudaContext> context_;
  uint64_t bytes_ = 0, mapped_ = 0;
};

void check_device(const sys::CudaContext& context, const Buffer& buffer) {
  unsigned kind = 0;
  int ordinal = -1;
  int names[] = {shim::kCuPointerAttributeMemoryType, shim::kCuPointerAttributeDeviceOrdinal};
  void* values[] = {&kind, &ordinal};
  for (const uint64_t at : {uint64_t{0}, buffer.bytes - 1}) {
    const auto address = reinterpret_cast<shim::CuDevicePtr>(buffer.data) + at;
    shim::cuda_check(shim::cuda().api.pointer_get_attributes(2, names, values, address), "cuPointerGetAttributes");
    if (kind != 2 || ordinal != context.device())
      throw Error(Code::kInvalid, "the buffer is said to be on CUDA device " + std::to_string(buffer.device) +
                                      ", but its " + (at == 0 ? "first" : "last") + " byte is " +
                                      (kind == 2   ? "on device " + std::to_string(ordinal)
                                       : kind == 1 ? "pinned host memory"
                                                   : "no memory that CUDA knows"));
  }
}

// The driver's handle of the memory at an address, released with the object; 0: not made by the virtual memory calls.
class Retained {
 public:
  explicit Retained(uint64_t address) {
    if (shim::cuda().api.vmm_retain(&handle_, reinterpret_cast<void*>(address)) != shim::kCuSuccess) handle_ = 0;
  }
  ~Retained() {
    if (handle_ != 0) report(shim::cuda().api.vmm_release(handle_), "cuMemRelease failed");
  }
  Retained(const Retained&) = delete;
  Retained& operator=(const Retained&) = delete;
  shim::CuMemHandle get() const noexcept { return handle_; }

 private:
  shim::CuMemHandle handle_ = 0;
};

// Pieces lie one after another, each mapped whole (as PyTorch's expandable segments are): where the handle changes, the
// next begins.
void export_pieces(ExportedRegion& region) {
  const auto begin = reinterpret_cast<uint64_t>(region.buffer.data);
  const uint64_t end = begin + region.buffer.bytes;
  uint64_t first = begin / kGranularity * kGranularity;
  const Retained own(first);
  if (own.get() == 0) throw Error(Code::kUnavailable, "neither cudaMalloc nor cuMemCreate memory");
  while (first >= kGranularity) {
    const Retained before(first - kGranularity);
    if (before.get() != own.get()) break;
    first -= kGranularity;
  }
  region.key.offset = begin - first;
  for (uint64_t at = first; at < end;) {
    const Retained piece(at);
    if (piece.get() == 0) throw Error(Code::kUnavailable, "a hole in the buffer's memory");
    uint64_t bytes = 0;
    do bytes += kGranularity;
    while (Retained(at + bytes).get() == piece.get());
    int fd = -1;
    shim::cuda_check(shim::cuda().api.vmm_export(&fd, piece.get(), shim::kCuHandlePosixFd, 0),
                     "cuMemExportToShareableHandle (was it made with CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR?)");
    region.pieces.emplace_back(fd);
    region.key.pieces.push_back(bytes);
    region.key.allocation += bytes;
    if (region.pieces.size() > kMaxPieces) throw Error(Code::kUnavailable, "memory of more than 6000 pieces");
    at += bytes;
  }
  region.key.kind = Key::Kind::kPieces;
}

}  // namespace

ExportedRegion host_region(const Buffer& buffer) {
  ExportedRegion region;
  region.buffer = buffer;
  region.key.process = this_process();
  region.key.device = kHost;
  region.key.refusal = "host memory";
  return region;
}

ExportedRegion export_region(const sys::CudaContext& context, const Buffer& buffer) {
  const sys::CudaScope scope(context);
  const shim::CudaDriver& api = shim::cuda().api;
  check_device(context, buffer);
  ExportedRegion region;
  region.buffer = buffer;
  region.key.process = this_process();
  region.key.device = buffer.device;
  const auto address = reinterpret_cast<shim::CuDevicePtr>(buffer.data);
  shim::CuDevicePtr base = 0;
  size_t bytes = 0;
  shim::CuResult result = api.ipc_get_handle(&region.key.handle, address);
  if (result == shim::kCuSuccess) result = api.mem_address_range(&base, &bytes, address);
  if (result == shim::kCuSuccess && address + buffer.bytes <= base + bytes) {
    region.key.kind = Key::Kind::kHandle;
    region.key.offset = address - base;
    region.key.allocation = bytes;
    return region;
  }
  try {
    export_pieces(region);
  } catch (const Error& error) {
    region.pieces.clear();
    region.key.pieces.clear();
    region.key.refusal =
        "cuIpcGetMemHandle: " +
        (result == shim::kCuSuccess ? std::string("the buffer spans allocations") : shim::cuda_error(result)) + "; " +
        error.what();
    region.key.refusal.resize(std::min<size_t>(region.key.refusal.size(), 1024));
  }
  return region;
}

std::shared_ptr<Mapped> map_handle(std::shared_ptr<const sys::CudaContext> context, const Key& key) {
  return std::make_shared<SharedHandle>(std::move(context), key.handle);
}

std::shared_ptr<Mapped> map_pieces(std::shared_ptr<const sys::CudaContext> context, const Key& key,
                                   const std::vector<sys::UniqueFd>& pieces) {
  if (pieces.size() != key.pieces.size()) throw Error(Code::kInvalid, "not as many descriptors as pieces");
  return std::make_shared<MappedPieces>(std::move(context), key, pieces);
}

void enable_peer(const sys::CudaContext& context, int other) {
  const sys::CudaContext there(other);
  if (there.device() == context.device()) return;
  const sys::CudaScope scope(context);
  const shim::CuResult result = shim::cuda().api.context_enable_peer(there.get(), 0);
  if (result != shim::kCuPeerAlreadyEnabled) shim::cuda_check(result, "cuCtxEnablePeerAccess");
}

}  // namespace pdxfer::transport::cuda_ipc
