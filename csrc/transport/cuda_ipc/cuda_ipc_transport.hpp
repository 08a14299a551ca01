// cuda_ipc: device memory between two processes of one machine, by kernels and the copy engine of the sender's GPU that
// write straight into the receiver's memory, mapped here. docs/design/cuda_ipc.md tells how and what it asks.
#pragma once

#include <memory>

#include "transport/transport.hpp"

namespace pdxfer::transport {

// Throws Error(kUnavailable) without a CUDA driver or device, kInvalid for `context.cuda`.
std::unique_ptr<Transport> make_cuda_ipc(Context context);

}  // namespace pdxfer::transport
