// pdx_paged_copy_N: moves a piece of a factorised copy in one launch, in words of N bytes, between any memory that the
// device reaches: its own, a peer's mapped into it, pinned host memory. Launched by pack/device_copier.cpp; compiled by
// cmake/device_code.py, with nvcc or NVRTC, so it uses no header of CUDA. Owns nothing; the launch's stream orders it.
//
// Every thread finds the pair and slot of its word by two multiplications and one table entry, so a warp is full
// whatever the slot size, and nothing is searched. Warps never wait for one another.
//
// pdx_paged_copy_N_sum also sums what it read (pack/checksum.hpp), and stores nothing when asked to sum alone.
#include "pack/checksum.hpp"
#include "pack/paged_copy_args.hpp"

namespace pdxfer {
namespace {

using u64 = unsigned long long;

__device__ unsigned int divide(unsigned int n, const Divisor& by) {
  return (unsigned int)(((u64)n * by.multiplier) >> (31 + by.shift));
}

// Both sides are read or written once: past L1, whose space the table entries need.
template <typename Word>
__device__ Word load_word(u64 address) {
  return *reinterpret_cast<const Word*>(address);
}
template <typename Word>
__device__ void store_word(u64 address, Word word) {
  *reinterpret_cast<Word*>(address) = word;
}
#ifdef __CUDA_ARCH__
template <>
__device__ uint4 load_word<uint4>(u64 address) {
  uint4 word;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "l"(address));
  return word;
}
#endif

struct Place {
  u64 src, dst;
  unsigned int pair;  // of the launch
  u64 in_pair;        // bytes
};

struct Tables {
  const DevicePair* pairs;
  const DeviceSlot* slots;
};

template <typename Word>
__device__ Place place_of(const PagedCopyArgs& args, const Tables& tables, unsigned int at) {
  const unsigned int n = args.first + at;
  const unsigned int pair = divide(n, args.per_pair);
  const unsigned int in_pair = n - pair * args.per_pair.value;
  const unsigned int slot = divide(in_pair, args.per_slot);
  const u64 within = (u64)(in_pair - slot * args.per_slot.value) * sizeof(Word);
  const DevicePair bases = tables.pairs[pair];
  const DeviceSlot slots = tables.slots[slot];
  Place place;
  place.pair = pair;
  place.in_pair = (u64)in_pair * sizeof(Word);
  place.src = bases.src + slots.src * args.src_stride + within;
  place.dst = bases.dst + slots.dst * args.dst_stride + within;
  if (args.side == kSideGather) place.dst = args.buffer + (u64)at * sizeof(Word);
  if (args.side == kSideScatter) place.src = args.buffer + (u64)at * sizeof(Word);
  if (args.side == kSideSum) place.src = place.dst;
  return place;
}

__device__ u64 word_sum(unsigned int pair, u64 at, unsigned int word) { return checksum_of(pair, at, word); }
__device__ u64 word_sum(unsigned int pair, u64 at, uint4 word) {
  return checksum_of(pair, at, word.x, word.y, word.z, word.w);
}
__device__ u64 word_sum(unsigned int pair, u64 at, uint2 word) {
  const bool low = (at & 8) == 0;
  return checksum_of(pair, at, low ? word.x : 0u, low ? word.y : 0u, low ? 0u : word.x, low ? 0u : word.y);
}

// kDepth rows of a word per thread: all loads are in flight before the first store waits. Returns their sum.
template <typename Word, bool kSum>
__device__ u64 copy_tile(const PagedCopyArgs& args, const Tables& tables, unsigned int tile, unsigned int lane) {
  Word held[kDepth];
  Place places[kDepth];
  for (unsigned int k = 0; k < kDepth; ++k) {
    const unsigned int at = tile * kTileWords + k * kWarpThreads + lane;
    if (at >= args.count) continue;
    places[k] = place_of<Word>(args, tables, at);
    held[k] = load_word<Word>(places[k].src);
  }
  u64 sum = 0;
  for (unsigned int k = 0; k < kDepth; ++k) {
    if (tile * kTileWords + k * kWarpThreads + lane >= args.count) continue;
    if (!kSum || args.side != kSideSum) store_word<Word>(places[k].dst, held[k]);
    if (kSum) sum += word_sum(args.sum_pair + places[k].pair, args.sum_at + places[k].in_pair, held[k]);
  }
  return sum;
}

// To the warp's word: nobody else's, and no other kernel of the piece runs meanwhile.
__device__ void add_sum(u64* word, u64 sum, unsigned int lane) {
#ifdef __CUDA_ARCH__
  for (unsigned int step = kWarpThreads / 2; step > 0; step /= 2) sum += __shfl_down_sync(0xffffffffu, sum, step);
  if (lane == 0) *word += sum;
#else  // whose threads run one after another
  (void)lane;
  *word += sum;
#endif
}

__device__ unsigned int share_of(unsigned int tiles, unsigned int tile) {
  const unsigned int bits = 32 - __clz((int)(tiles - tile));
  return bits > kLastShare ? bits : kLastShare;
}

__device__ void tell_host(unsigned int* word, unsigned int value) {
#ifdef __CUDA_ARCH__
  __threadfence_system();
  *(volatile unsigned int*)word = value;
#else
  __atomic_store_n(word, value, __ATOMIC_RELEASE);
#endif
}

// One thread vouches for its block with one fence of the system; the last block's tells the host. The block's last
// thread, for a CPU on which they run one after another.
__device__ void tell_progress(const PagedCopyArgs& args) {
  __syncthreads();
  if (threadIdx.x != blockDim.x - 1) return;
  __threadfence_system();
  if (atomicAdd(args.blocks_over, 1u) != gridDim.x - 1) return;
  *args.blocks_over = 0;
  tell_host(args.progress, args.piece);
}

// This warp is past a share, of which it copied so many tiles. The block's last warp vouches for all of them with one
// fence of the system, which costs some microseconds; who brings the last tiles of the share tells the host.
__device__ void leave_share(const PagedCopyArgs& args, unsigned int tiles, unsigned int share, unsigned int copied) {
  u64* const here = args.landing + (1 + blockIdx.x) * kShares + share;
  const u64 left = (1ull << 32) + copied;
  const u64 now = atomicAdd(here, left) + left;
  if (now >> 32 != blockDim.x / kWarpThreads) return;
  *here = 0;
  __threadfence_system();
  const u64 landed = now & 0xffffffffu;
  if (atomicAdd(args.landing + share, landed) + landed != tiles_of_share(tiles, share)) return;
  args.landing[share] = 0;
  tell_host(args.report->landed + share, 1);
}

// Multiprocessors do not get equal shares of a link: with equal shares of the work the last would end well after the
// first. So a warp takes the next tile that nobody has, and asks for it before it copies the one in hand.
template <typename Word, bool kSum>
__device__ void copy_words(const PagedCopyArgs& args, const Tables& tables) {
  const unsigned int lane = threadIdx.x % kWarpThreads;
  const unsigned int warp = (blockIdx.x * blockDim.x + threadIdx.x) / kWarpThreads;
  const unsigned int warps = gridDim.x * blockDim.x / kWarpThreads;
  const unsigned int tiles = (args.count + kTileWords - 1) / kTileWords;
  u64 sum = 0;
  const bool tells = kSum && args.landing != nullptr;
  unsigned int share = share_of(tiles, 0), copied = 0;  // tiles of it
  // Its last lane tells, for a CPU on which a warp's threads run one after another.
  const auto go_on = [&](unsigned int to) {
    __threadfence_block();
    __syncwarp();
    for (; share > to; --share, copied = 0)
      if (lane == kWarpThreads - 1) leave_share(args, tiles, share, copied);
  };
  for (unsigned int tile = warp; tile < tiles;) {
    unsigned int next = tile;
    if (args.tiles_taken != nullptr && lane == 0) next = atomicAdd(args.tiles_taken, 1u) - args.taken_before;
    if (tells && share != share_of(tiles, tile)) go_on(share_of(tiles, tile));
    sum += copy_tile<Word, kSum>(args, tables, tile, lane);
    ++copied;
    if (args.tiles_taken != nullptr) next = __shfl_sync(0xffffffffu, next, 0);
    tile = warps + next;
  }
  if (!kSum) {
    if (args.progress != nullptr) tell_progress(args);
    return;
  }
  add_sum(args.report->sums + warp, sum, lane);
  if (tells) go_on(kLastShare - 1);
}

}  // namespace
}  // namespace pdxfer

#define PDX_KERNEL(name, Word, kSum)                                                                           \
  extern "C" __global__ void __launch_bounds__(pdxfer::kBlockThreads) name(const pdxfer::PagedCopyArgs args) { \
    pdxfer::copy_words<Word, kSum>(args, {args.pairs, args.slots});                                            \
  }
#define PDX_KERNELS(bytes, Word)                  \
  PDX_KERNEL(pdx_paged_copy_##bytes, Word, false) \
  PDX_KERNEL(pdx_paged_copy_##bytes##_sum, Word, true)
PDX_KERNELS(16, uint4)
PDX_KERNELS(8, uint2)
PDX_KERNELS(4, unsigned int)
PDX_KERNELS(2, unsigned short)
PDX_KERNELS(1, unsigned char)

// The commonest words, with the tables among the kernel's parameters.
#define PDX_INLINE_KERNEL(name, kSum)                                                                          \
  extern "C" __global__ void __launch_bounds__(pdxfer::kBlockThreads)                                          \
      name(const __grid_constant__ pdxfer::PagedCopyInlineArgs all) {                                          \
    pdxfer::copy_words<uint4, kSum>(all.args,                                                                  \
                                    {reinterpret_cast<const pdxfer::DevicePair*>(all.tables + all.pairs_at),   \
                                     reinterpret_cast<const pdxfer::DeviceSlot*>(all.tables + all.slots_at)}); \
  }
PDX_INLINE_KERNEL(pdx_paged_copy_16_inline, false)
PDX_INLINE_KERNEL(pdx_paged_copy_16_inline_sum, true)
