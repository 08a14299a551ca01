// A CUDA driver for machines without one: host memory stands in for device memory, a thread per stream runs copies and
// the real kernels (compiled for the CPU) after a short random delay, and handles open memory of other processes.
// install() puts it in place of the driver for the whole process; two devices, of 8 "multiprocessors" each.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fake_cuda {

void install();
// Memory of a device, as cudaMalloc gives it, or of separately made pieces of 2 MiB, as expandable segments.
std::byte* allocate(int ordinal, size_t bytes);
std::byte* allocate_pieces(int ordinal, size_t pieces);
void release(std::byte* memory);
void release_pieces(std::byte* memory, size_t pieces);

size_t mappings();                         // of other processes' memory, open now
unsigned engine_copies();                  // copies of the copy engine so far,
unsigned engine_batches();                 // and the calls that gave it several
unsigned clustered_launches();             // kernels launched in clusters so far
void refuse_clusters(bool refused);        // as a slice of a GPU does
void refuse_engine_copies(bool refused);   // as invalid
void allow_engine_copies(int count);       // so many more, others are invalid; INT_MAX: all
void refuse_batches(bool refused);         // as a driver of before CUDA 12.8, which has no such call
void refuse_progress(bool refused);        // writing words from a stream, as not supported
void set_delay_us(unsigned microseconds);  // before each operation of a stream, at random up to this
void set_engine_delay_ms(unsigned ms);     // before each copy of the copy engine
void fail_next_launch(int result);         // once
void refuse_mapping(bool refused);         // opening handles fails as without P2P

// What a dma-buf of this driver tells who reads it: the addresses that it stands for.
struct DmabufContent {
  uint64_t begin = 0, bytes = 0;
};
enum class Dmabuf { kWorks, kRefused, kOldDriver };  // kRefused: as with the closed kernel modules
void set_dmabuf(Dmabuf how);

}  // namespace fake_cuda
