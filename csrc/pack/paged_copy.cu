// pdx_paged_copy_N: moves a piece of a factorised copy in one launch, in words of N bytes, between any memory that the
// device reaches: its own, a peer's mapped into it, pinned host memory. Launched by pack/device_copier.cpp; compiled by
// cmake/device_code.py, with nvcc or NVRTC, so it uses no header of CUDA. Owns nothing; the launch's stream orders it.
//
// Every thread finds the pair and slot of its word by two multiplications and one table entry, so a warp is full
// whatever the slot size, and nothing is searched. Warps never wait for one another.
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
  place.src = bases.src + slots.src * args.src_stride + within;
  place.dst = bases.dst + slots.dst * args.dst_stride + within;
  if (args.side == kSideGather) place.dst = args.buffer + (u64)at * sizeof(Word);
  if (args.side == kSideScatter) place.src = args.buffer + (u64)at * sizeof(Word);
  return place;
}

// kDepth rows of a word per thread: all loads are in flight before the first store waits.
template <typename Word>
__device__ void copy_tile(const PagedCopyArgs& args, const Tables& tables, unsigned int tile, unsigned int lane) {
  Word held[kDepth];
  u64 to[kDepth];
  for (unsigned int k = 0; k < kDepth; ++k) {
    const unsigned int at = tile * kTileWords + k * kWarpThreads + lane;
    if (at >= args.count) continue;
    const Place place = place_of<Word>(args, tables, at);
    to[k] = place.dst;
    held[k] = load_word<Word>(place.src);
  }
  for (unsigned int k = 0; k < kDepth; ++k)
    if (tile * kTileWords + k * kWarpThreads + lane < args.count) store_word<Word>(to[k], held[k]);
}

// Multiprocessors do not get equal shares of a link: with equal shares of the work the last would end well after the
// first. So a warp takes the next tile that nobody has, and asks for it before it copies the one in hand.
template <typename Word>
__device__ void copy_words(const PagedCopyArgs& args, const Tables& tables) {
  const unsigned int lane = threadIdx.x % kWarpThreads;
  const unsigned int warps = gridDim.x * blockDim.x / kWarpThreads;
  const unsigned int tiles = (args.count + kTileWords - 1) / kTileWords;
  unsigned int tile = (blockIdx.x * blockDim.x + threadIdx.x) / kWarpThreads;
  while (tile < tiles) {
    unsigned int next = tile;
    if (args.tiles_taken != nullptr && lane == 0) next = atomicAdd(args.tiles_taken, 1u) - args.taken_before;
    copy_tile<Word>(args, tables, tile, lane);
    if (args.tiles_taken != nullptr) next = __shfl_sync(0xffffffffu, next, 0);
    tile = warps + next;
  }
}

}  // namespace
}  // namespace pdxfer

#define PDX_KERNEL(name, Word)                                                                                 \
  extern "C" __global__ void __launch_bounds__(pdxfer::kBlockThreads) name(const pdxfer::PagedCopyArgs args) { \
    pdxfer::copy_words<Word>(args, {args.pairs, args.slots});                                                  \
  }
PDX_KERNEL(pdx_paged_copy_16, uint4)
PDX_KERNEL(pdx_paged_copy_8, uint2)
PDX_KERNEL(pdx_paged_copy_4, unsigned int)
PDX_KERNEL(pdx_paged_copy_2, unsigned short)
PDX_KERNEL(pdx_paged_copy_1, unsigned char)

// The commonest words, with the tables among the kernel's parameters.
extern "C" __global__ void __launch_bounds__(pdxfer::kBlockThreads)
    pdx_paged_copy_16_inline(const __grid_constant__ pdxfer::PagedCopyInlineArgs all) {
  pdxfer::copy_words<uint4>(all.args, {reinterpret_cast<const pdxfer::DevicePair*>(all.tables + all.pairs_at),
                                       reinterpret_cast<const pdxfer::DeviceSlot*>(all.tables + all.slots_at)});
}
