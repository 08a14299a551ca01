// The factorised copy as the device kernel takes it: plain structs, the same bytes for the host compiler and for every
// CUDA compiler. Filled by pack/paged_copy_device.cpp, read by pack/paged_copy.cu. Includes nothing: NVRTC has no
// standard headers.
#pragma once

namespace pdxfer {

// A RegionPair with its offsets added to mapped addresses: slot s begins at src + s * src_stride.
struct DevicePair {
  unsigned long long src, dst;
  unsigned long long src_stride, dst_stride;
  unsigned long long slot_bytes;
};

// A Run with the number of slots before it, so that a slot's run is found by binary search.
struct DeviceRun {
  unsigned int src_slot, dst_slot;
  unsigned long long first;
};

// The kernel's one argument. Items are (pair, slot, piece of a slot); a warp moves one item at a time.
struct PagedCopyArgs {
  const DevicePair* pairs;
  const DeviceRun* runs;
  unsigned long long slots;   // per pair: the sum of all run counts
  unsigned long long pieces;  // per slot: of the largest slot; shorter slots leave their last pieces empty
  unsigned int pair_count;
  unsigned int run_count;
};

constexpr unsigned int kPieceBytes = 8192;  // bytes a warp moves before it looks for its next item; multiple of 512
constexpr unsigned int kBlockThreads = 256;

static_assert(sizeof(DevicePair) == 40 && sizeof(DeviceRun) == 16 && sizeof(PagedCopyArgs) == 40,
              "host and device compilers must lay these out alike");

}  // namespace pdxfer
