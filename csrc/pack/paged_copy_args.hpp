// The factorised copy as the device kernels take it: plain structs, the same bytes for the host compiler and for every
// CUDA compiler. Filled by pack/device_copier.cpp, read by pack/paged_copy.cu. Includes no standard header: NVRTC has
// none.
#pragma once

#include "pack/checksum.hpp"

namespace pdxfer {

// Where slot 0 of each side of a pair begins: the regions' addresses with the pair's offsets added.
struct DevicePair {
  unsigned long long src, dst;
};

// One slot of every pair. Runs are unrolled to these once per copy: 8 bytes a slot, whatever the number of pairs, save
// the kernel a search for the run of each of its words.
struct DeviceSlot {
  unsigned int src, dst;
};

// Division of n < 2^31 by a constant d > 0 as a multiplication: n / d == (n * multiplier) >> (31 + shift).
// With 2^(shift-1) < d <= 2^shift the rounded-up multiplier fits 32 bits and errs by less than one for every such n.
struct Divisor {
  unsigned int multiplier, shift, value;
};
#ifndef __CUDACC_RTC__  // NVRTC takes no host functions, and only the host prepares divisors
constexpr Divisor divisor_of(unsigned int d) {
  unsigned int shift = 0;
  while ((1ull << shift) < d) ++shift;
  return {(unsigned int)(((1ull << (31 + shift)) + d - 1) / d), shift, d};
}
#endif

// DeviceForm.
constexpr unsigned int kSidePaged = 0, kSideGather = 1, kSideScatter = 2, kSideSum = 3;

// What kernels that sum tell of a piece, in pinned host memory, zero before. Its tiles have shares: half of what is
// left, each, and from kLastShare on the rest. Share b has the tiles from which on b bits count those that are left.
constexpr unsigned int kShares = 33, kLastShare = 12;
struct PieceReport {
  unsigned int landed[kShares + 1];  // 1: the share is in place
  unsigned long long sums[1];        // as many as the piece has warps: each adds what it read
};
PDX_HOST_DEVICE inline unsigned int tiles_of_share(unsigned int tiles, unsigned int share) {
  const unsigned int end = share < 32 ? (1u << share) - 1 : ~0u;  // most that may be left
  return (tiles < end ? tiles : end) - (share > kLastShare ? (1u << (share - 1)) - 1 : 0);
}

// A kernel's one argument: `count` words from word `first` on, counted through all slots of the first pair, then of the
// next, and so on. Every pair of a launch has the same strides and slot size.
struct PagedCopyArgs {
  const DevicePair* pairs;
  const DeviceSlot* slots;
  unsigned long long src_stride, dst_stride;
  unsigned long long buffer;   // kSideGather, kSideScatter: where word `first` lies
  Divisor per_pair, per_slot;  // words
  unsigned int first, count;   // first + count < 2^31
  unsigned int side;           // kSidePaged, ...
  unsigned int sum_pair;       // of kernels that sum: the number of the first pair in its copy,
  unsigned long long sum_at;   // how far into its pair the words are counted from,
  PieceReport* report;         // and where they say what they have done
  // Tiles beyond the first of each warp are handed out by counting up `*tiles_taken`, which stands at taken_before when
  // the kernel begins and has grown by the number of tiles when it ends. Null: every warp strides through its own.
  unsigned int taken_before;
  unsigned int piece;  // of kernels that do not sum: what the last block to end writes to `progress`, when everything
  unsigned int* progress;     // before it is visible to the whole system. Null: nothing.
  unsigned int* blocks_over;  // counts them for that, in device memory; zero before and after
  unsigned int* tiles_taken;
  // Tiles of each share that are in place, counted in device memory, zero before and after: kShares words for all, then
  // as many for each block, with the warps that are past the share in the upper half. Null: shares are not told.
  unsigned long long* landing;
};

// Tables that are small enough travel with the launch, which saves the upload of their own.
constexpr unsigned int kInlineBytes = 3952;
struct PagedCopyInlineArgs {
  PagedCopyArgs args;               // whose pairs and slots are unused
  unsigned int pairs_at, slots_at;  // in tables
  alignas(16) unsigned char tables[kInlineBytes];
};

constexpr unsigned int kBlockThreads = 1024;
constexpr unsigned int kWarpThreads = 32;
constexpr unsigned int kDepth = 4;  // words a thread loads before it stores the first
constexpr unsigned int kTileWords = kDepth * kWarpThreads;

static_assert(sizeof(DevicePair) == 16 && sizeof(DeviceSlot) == 8 && sizeof(PagedCopyArgs) == 136 &&
                  sizeof(PagedCopyInlineArgs) == 4096,  // which is what a kernel's parameters may have
              "host and device compilers must lay these out alike");

}  // namespace pdxfer
