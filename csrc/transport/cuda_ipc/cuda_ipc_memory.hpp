// Device memory handed to another process, and another process's device memory mapped into this one. Set-up threads and
// the poll thread; mappings are shared by every region that lies in the same allocation and end with the last of them.
#pragma once

#include <memory>
#include <vector>

#include "core/types.hpp"
#include "sys/cuda_memory.hpp"
#include "sys/fd.hpp"
#include "transport/cuda_ipc/cuda_ipc_wire.hpp"

namespace pdxfer::transport::cuda_ipc {

// What the owner keeps of a registered region: its key and, for memory made of pieces, a descriptor of each.
struct ExportedRegion {
  Buffer buffer;
  Key key;
  std::vector<sys::UniqueFd> pieces;
};

// Host memory, which is reached through staging only.
ExportedRegion host_region(const Buffer& buffer);
// Throws Error(kInvalid) when the buffer is not memory of that device.
ExportedRegion export_region(const sys::CudaContext& context, const Buffer& buffer);

// Addresses of another process's memory in this one; unmapped at the end.
class Mapped {
 public:
  virtual ~Mapped() = default;
  uint64_t address = 0;  // of the allocation, or of the first piece
};

// Open an allocation for the device of `context`. Throws Error(kUnavailable): no peer access, handle of a dead process.
std::shared_ptr<Mapped> map_handle(std::shared_ptr<const sys::CudaContext> context, const Key& key);
// Likewise, for pieces, in their order.
std::shared_ptr<Mapped> map_pieces(std::shared_ptr<const sys::CudaContext> context, const Key& key,
                                   const std::vector<sys::UniqueFd>& pieces);
// Memory of this process: the addresses are good as they are, once the devices may reach each other.
void enable_peer(const sys::CudaContext& context, int other);

}  // namespace pdxfer::transport::cuda_ipc
