// The kernels of pack/paged_copy.cu by name, run by the calling thread.
#pragma once

#include <functional>
#include <string>

#include "pack/paged_copy_args.hpp"

namespace fake_cuda {

struct Kernel {  // one of the two
  void (*plain)(pdxfer::PagedCopyArgs) = nullptr;
  void (*inlined)(pdxfer::PagedCopyInlineArgs) = nullptr;
};
const Kernel* find_kernel(const std::string& name);  // null: there is none
// A launch with the parameter as it is now.
std::function<void()> launch_of(const Kernel& kernel, unsigned blocks, const void* parameter);

}  // namespace fake_cuda
