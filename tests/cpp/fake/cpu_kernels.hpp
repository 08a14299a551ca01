// The kernels of pack/paged_copy.cu by name, run by the calling thread.
#pragma once

#include <string>

#include "pack/paged_copy_args.hpp"

namespace fake_cuda {

using Kernel = void (*)(pdxfer::PagedCopyArgs);
Kernel find_kernel(const std::string& name);  // null: there is none
void run_kernel(Kernel kernel, unsigned blocks, const pdxfer::PagedCopyArgs& args);

}  // namespace fake_cuda
