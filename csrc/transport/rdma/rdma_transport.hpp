// rdma: memory moved between machines by the network cards of both, over InfiniBand or RoCE, with ibverbs. Host memory,
// and GPU memory where the driver lends it to the card (dma-buf or nvidia-peermem). See docs/design/rdma.md.
#pragma once

#include "shim/verbs.hpp"
#include "sys/rdma_devices.hpp"
#include "transport/transport.hpp"

namespace pdxfer::transport {

// Throws Error(kUnavailable) with every port's reason when none can be used.
std::unique_ptr<Transport> make_rdma(Context context);
// The same with a verbs table and devices of the caller's (tests). The table must outlive the transport.
std::unique_ptr<Transport> make_rdma_on(Context context, const shim::VerbsApi& api,
                                        std::span<const sys::DeviceInfo> devices);

}  // namespace pdxfer::transport
