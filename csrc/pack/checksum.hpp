// The checksum of a copy, the same for the host compiler and every CUDA compiler: pack/paged_copy.cu computes it while
// it copies and while it reads what has landed, pack/device_selftest.cpp as the reference. Includes nothing: NVRTC has
// no standard headers.
//
// A pair's bytes, in canonical order (run, slot, byte), are blocks of 16: four 32-bit lanes. The checksum is the sum,
// modulo 2^64, over all blocks of all pairs, of key(pair, block) * (w0 l0 + w1 l1 + w2 l2 + w3 l3). Every term is
// linear in its lanes, so it does not matter into what words, pieces or threads the copy is cut, nor in which order
// they are added. Keys and weights are odd, so whatever changes one lane alone changes the sum; other faults that are
// not made for it escape by chance, once in 2^64. It is no defence against somebody who chooses the bytes.
#pragma once

#ifdef __CUDACC__
#define PDX_HOST_DEVICE __host__ __device__
#else
#define PDX_HOST_DEVICE
#endif

namespace pdxfer {

// Multipliers of xxHash32: odd, and of no pattern.
constexpr unsigned int kWeight0 = 0x9E3779B1u, kWeight1 = 0x85EBCA77u, kWeight2 = 0xC2B2AE3Du, kWeight3 = 0x27D4EB2Fu;

// Of block `block` of pair `pair`: two rounds of multiplying and folding, so that no two keys differ by a pattern.
PDX_HOST_DEVICE inline unsigned long long checksum_key(unsigned int pair, unsigned int block) {
  unsigned int mixed = block * kWeight0;
  mixed = (mixed ^ (mixed >> 15)) + pair * kWeight1;
  mixed *= 0x2C1B3C6Du;
  mixed ^= mixed >> 13;
  return (mixed * 0xD6E8FEB86659FD93ull) | 1u;
}

// What the lanes of a block add, `at` bytes into the pair; those that are not at hand are 0.
PDX_HOST_DEVICE inline unsigned long long checksum_of(unsigned int pair, unsigned long long at, unsigned int l0,
                                                      unsigned int l1, unsigned int l2, unsigned int l3) {
  using Wide = unsigned long long;
  return checksum_key(pair, (unsigned int)(at >> 4)) *
         ((Wide)kWeight0 * l0 + (Wide)kWeight1 * l1 + (Wide)kWeight2 * l2 + (Wide)kWeight3 * l3);
}

// Likewise of a word of 1, 2 or 4 bytes, which `at` is a multiple of.
PDX_HOST_DEVICE inline unsigned long long checksum_of(unsigned int pair, unsigned long long at, unsigned int word) {
  const unsigned int lane = (unsigned int)(at >> 2) & 3u, value = word << (8u * ((unsigned int)at & 3u));
  return checksum_of(pair, at, lane == 0u ? value : 0u, lane == 1u ? value : 0u, lane == 2u ? value : 0u,
                     lane == 3u ? value : 0u);
}

}  // namespace pdxfer
