// shm: host memory between two processes of one machine, with one copy. docs/design/shm.md explains the three ways
// (map, cma, staging) and what each asks of the machine.
#pragma once

#include <memory>

#include "transport/transport.hpp"

namespace pdxfer::transport {

// `context.copy` must be set; `context.shm_path` is auto, map, cma or staging. Throws Error.
std::unique_ptr<Transport> make_shm(Context context);

}  // namespace pdxfer::transport
