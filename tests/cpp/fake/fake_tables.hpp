// The halves of the fake driver's table of functions, each filled by the file that has them.
#pragma once

#include "shim/cuda.hpp"

namespace fake_cuda {
void fill_memory_table(pdxfer::shim::CudaDriver& api);
void fill_stream_table(pdxfer::shim::CudaDriver& api);
int current_ordinal();
}  // namespace fake_cuda
