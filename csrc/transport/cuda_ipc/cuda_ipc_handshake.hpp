// Making the connection of a link: the socket, and what each end has. Runs on the thread that calls connect, at both
// ends at once, before the link exists.
#pragma once

#include <memory>

#include "sys/seqpacket.hpp"
#include "sys/token_listener.hpp"
#include "transport/cuda_ipc/cuda_ipc_progress.hpp"
#include "transport/cuda_ipc/cuda_ipc_wire.hpp"
#include "transport/stream/channel.hpp"
#include "transport/stream/slot_ring.hpp"
#include "transport/transport.hpp"

namespace pdxfer::transport::cuda_ipc {

struct Connection {
  sys::UniqueFd socket;
  sys::UniqueFd process;  // becomes readable when the other end's process ends; none on an old kernel
  // For what cannot be mapped: a stream, and the slots that its device memory passes through.
  std::unique_ptr<stream::Channel> channel;
  std::unique_ptr<stream::SlotRing> ring;
  std::unique_ptr<Progress> progress, peer_progress;
};

// Throws Error(kUnavailable, kTimeout) with the reason when cuda_ipc cannot serve this peer.
Connection make_connection(const Context& context, const local::Address& here, const Hello& hello,
                           sys::TokenListener& listener, const transport::Link& link);

}  // namespace pdxfer::transport::cuda_ipc
