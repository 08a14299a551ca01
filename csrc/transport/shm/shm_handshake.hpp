// Making the connection of a link: the socket, who is at the other end, and which ways work in each direction.
// Runs on the thread that calls connect, at both ends at once, before the link exists.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "sys/seqpacket.hpp"
#include "sys/token_listener.hpp"
#include "transport/shm/shm_cma.hpp"
#include "transport/shm/shm_key.hpp"
#include "transport/shm/shm_ring.hpp"
#include "transport/transport.hpp"

namespace pdxfer::transport::shm {

struct Connection {
  sys::UniqueFd socket;
  std::optional<CmaWriter> cma;  // set when writing to the other process works
  std::string why_not_cma;
  int process = 0;                    // 0: not visible from here
  std::unique_ptr<RingChannel> ring;  // set, at both ends, when a direction has nothing better for private memory
};

// Throws Error(kUnavailable, kTimeout) with the reason when shm cannot serve this peer.
Connection make_connection(const Context& context, const local::Address& here, sys::TokenListener& listener,
                           const transport::Link& link);

}  // namespace pdxfer::transport::shm
