// loopback: two engines in one process. The reference for the seam: one process-wide mutex, no threads, every clause
// in the obvious way. Tests run on it, and it shows in 300 lines what a transport owes; it is never chosen by default.
#pragma once

#include <memory>

#include "transport/transport.hpp"

namespace pdxfer::transport {

// `context.copy` must be set. Throws Error(kInvalid).
std::unique_ptr<Transport> make_loopback(Context context);

}  // namespace pdxfer::transport
