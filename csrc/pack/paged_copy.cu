// pdx_paged_copy: moves a whole factorised copy (every run, in every pair) in one launch, on one device or between a
// device and memory mapped into it. Launched by pack/paged_copy_device.cpp; compiled by cmake/device_code.py, with nvcc
// or NVRTC, so it uses no header of CUDA. Owns nothing; the launch's stream orders it.
#include "pack/paged_copy_args.hpp"

namespace pdxfer {
namespace {

constexpr unsigned int kWarp = 32;
using u64 = unsigned long long;

// Words of one size by one warp: kDepth loads are in flight before the first store waits for one.
template <typename Word>
__device__ void copy_words(u64 src, u64 dst, u64 words, unsigned int lane) {
  constexpr unsigned int kDepth = 4;
  const Word* from = reinterpret_cast<const Word*>(src);
  Word* to = reinterpret_cast<Word*>(dst);
  u64 i = lane;
  for (; i + (kDepth - 1) * kWarp < words; i += kDepth * kWarp) {
    Word held[kDepth];
    for (unsigned int k = 0; k < kDepth; ++k) held[k] = from[i + k * kWarp];
    for (unsigned int k = 0; k < kDepth; ++k) to[i + k * kWarp] = held[k];
  }
  for (; i < words; i += kWarp) to[i] = from[i];
}

// Words need both sides aligned alike: the bytes before the first aligned word and after the last one go singly.
template <typename Word>
__device__ void copy_aligned_alike(u64 src, u64 dst, u64 bytes, unsigned int lane) {
  const u64 head = min(bytes, (0 - src) & (sizeof(Word) - 1));
  const u64 body = (bytes - head) & ~(u64)(sizeof(Word) - 1);
  const u64 tail = bytes - head - body;
  copy_words<unsigned char>(src, dst, head, lane);
  copy_words<Word>(src + head, dst + head, body / sizeof(Word), lane);
  copy_words<unsigned char>(src + head + body, dst + head + body, tail, lane);
}

__device__ void copy_piece(u64 src, u64 dst, u64 bytes, unsigned int lane) {
  const u64 differ = src ^ dst;
  if ((differ & 15) == 0)
    copy_aligned_alike<uint4>(src, dst, bytes, lane);
  else if ((differ & 7) == 0)
    copy_aligned_alike<uint2>(src, dst, bytes, lane);
  else if ((differ & 3) == 0)
    copy_aligned_alike<unsigned int>(src, dst, bytes, lane);
  else if ((differ & 1) == 0)
    copy_aligned_alike<unsigned short>(src, dst, bytes, lane);
  else
    copy_words<unsigned char>(src, dst, bytes, lane);
}

// The run that holds `slot`: the last whose first is not above it. Runs are never empty.
__device__ const DeviceRun& run_of(const PagedCopyArgs& copy, u64 slot) {
  unsigned int low = 0, high = copy.run_count;
  while (high - low > 1) {
    const unsigned int middle = low + (high - low) / 2;
    if (copy.runs[middle].first <= slot)
      low = middle;
    else
      high = middle;
  }
  return copy.runs[low];
}

}  // namespace
}  // namespace pdxfer

extern "C" __global__ void __launch_bounds__(pdxfer::kBlockThreads) pdx_paged_copy(const pdxfer::PagedCopyArgs copy) {
  using namespace pdxfer;
  const unsigned int lane = threadIdx.x % kWarp;
  const u64 warp = ((u64)blockIdx.x * blockDim.x + threadIdx.x) / kWarp;
  const u64 warps = (u64)gridDim.x * blockDim.x / kWarp;
  const u64 per_pair = copy.slots * copy.pieces;
  for (u64 item = warp; item < per_pair * copy.pair_count; item += warps) {
    const DevicePair& pair = copy.pairs[item / per_pair];
    const u64 slot = item % per_pair / copy.pieces;
    const u64 begin = item % copy.pieces * kPieceBytes;
    if (begin >= pair.slot_bytes) continue;
    const DeviceRun& run = run_of(copy, slot);
    const u64 within = slot - run.first;
    copy_piece(pair.src + (run.src_slot + within) * pair.src_stride + begin,
               pair.dst + (run.dst_slot + within) * pair.dst_stride + begin,
               min((u64)kPieceBytes, pair.slot_bytes - begin), lane);
  }
}
