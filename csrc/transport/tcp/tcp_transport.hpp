// tcp: host memory between machines, over several TCP connections per peer and the stream protocol (../stream).
// The engine makes one per process; its threads are a listener and the io threads.
#pragma once

#include <memory>

#include "transport/transport.hpp"

namespace pdxfer::transport {

// Listens on context.host (IPv4, IPv6 or a name; 0.0.0.0 and :: mean every interface, and peers then use the host
// under which they reached the control connection) and a port of the kernel's choice. Throws Error(kUnavailable).
std::unique_ptr<Transport> make_tcp(Context context);

}  // namespace pdxfer::transport
