// The device kernels compiled for the CPU, their threads run one after another. What the first thread of a warp gives
// the others is kept until they have run, which is faithful because warps never wait for one another.
#include "cpu_kernels.hpp"

#include <map>
#include <vector>

#include "fake_progress.hpp"

namespace {
struct Index {
  unsigned x;
};
thread_local Index threadIdx{}, blockIdx{}, blockDim{1024}, gridDim{1};
struct __attribute__((may_alias, aligned(16))) uint4 {
  unsigned x, y, z, w;
};
struct __attribute__((may_alias, aligned(8))) uint2 {
  unsigned x, y;
};
thread_local std::vector<unsigned> warp_values;  // in the order the warp's first thread gave them
thread_local size_t values_taken = 0;

template <typename Word>
Word atomicAdd(Word* at, Word by) {
  return __atomic_fetch_add(at, by, __ATOMIC_RELAXED);
}
unsigned __shfl_sync(unsigned, unsigned value, int) {
  if (threadIdx.x % 32 == 0) return warp_values.push_back(value), value;
  return warp_values.at(values_taken++);
}
int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }
void __threadfence_block() {}
void __threadfence_system() { fake_cuda::before_progress(); }
void __syncwarp() {}
void __syncthreads() {}
}  // namespace
#define __device__ static inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(threads)
// A word is stored only where it was loaded, under the same condition, which gcc 12 does not follow through the
// unrolled loops at -O3. Quietened here, since an initial value in the kernel would cost the device registers for
// nothing.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "pack/paged_copy.cu"
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

namespace fake_cuda {
namespace {

template <typename Args>
void run(void (*kernel)(Args), unsigned blocks, const Args& args) {
  gridDim.x = blocks;
  blockDim.x = pdxfer::kBlockThreads;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) {
      if (threadIdx.x % 32 == 0) warp_values.clear();
      values_taken = 0;
      kernel(args);
    }
}

}  // namespace

std::function<void()> launch_of(const Kernel& kernel, unsigned blocks, const void* parameter) {
  if (kernel.inlined != nullptr)
    return
        [=, args = *static_cast<const pdxfer::PagedCopyInlineArgs*>(parameter)] { run(kernel.inlined, blocks, args); };
  return [=, args = *static_cast<const pdxfer::PagedCopyArgs*>(parameter)] { run(kernel.plain, blocks, args); };
}

#define PDX_NAMED(name)                    \
  {#name, {&name, nullptr}}, {             \
    #name "_sum", { &name##_sum, nullptr } \
  }

const Kernel* find_kernel(const std::string& name) {
  static const std::map<std::string, Kernel> kernels = {
      PDX_NAMED(pdx_paged_copy_16),
      PDX_NAMED(pdx_paged_copy_8),
      PDX_NAMED(pdx_paged_copy_4),
      PDX_NAMED(pdx_paged_copy_2),
      PDX_NAMED(pdx_paged_copy_1),
      {"pdx_paged_copy_16_inline", {nullptr, &pdx_paged_copy_16_inline}},
      {"pdx_paged_copy_16_inline_sum", {nullptr, &pdx_paged_copy_16_inline_sum}}};
  const auto found = kernels.find(name);
  return found == kernels.end() ? nullptr : &found->second;
}

}  // namespace fake_cuda
