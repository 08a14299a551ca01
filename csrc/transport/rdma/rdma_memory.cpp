// Registering memory with every port at once: host memory as it is; GPU memory through its dma-buf, else through
// nvidia-peermem; each refusal is told. Any thread, without the transport's mutex: pinning gigabytes takes seconds.
#include <unistd.h>

#include <future>

#include "shim/cuda.hpp"
#include "sys/fd.hpp"
#include "transport/rdma/rdma_hub.hpp"

namespace pdxfer::transport::rdma {
namespace {

constexpr uint64_t kParallelBytes = 256 << 20;  // below this a thread costs more than it saves

// One registration per port, side by side when the memory is large: the kernel pins pages once per device.
template <typename Register>
std::vector<MemoryKey> with_every_port(const Hub& hub, uint64_t bytes, Register&& one) {
  std::vector<MemoryKey> keys;
  if (bytes < kParallelBytes || hub.ports.size() == 1) {
    for (const auto& port : hub.ports) keys.push_back(one(*port));
    return keys;
  }
  std::vector<std::future<MemoryKey>> under_way;
  for (const auto& port : hub.ports)
    under_way.push_back(std::async(std::launch::async, [&one, &port = *port] { return one(port); }));
  for (auto& future : under_way) keys.push_back(future.get());
  return keys;
}

LocalRegion register_device(const Hub& hub, const Region& region) {
  const Buffer& buffer = region.buffer;
  const auto address = reinterpret_cast<uint64_t>(buffer.data);
  std::string reasons;
  try {
    const DmabufRange range = export_dmabuf(buffer);
    return {buffer,
            with_every_port(hub, buffer.bytes,
                            [&](const Port& port) {
                              return port.register_dmabuf(range.fd.get(), range.offset, address, buffer.bytes);
                            }),
            "dma-buf"};
  } catch (const Error& error) {
    reasons = std::string("dma-buf: ") + error.what();
  }
  try {
    return {buffer,
            with_every_port(hub, buffer.bytes,
                            [&](const Port& port) { return port.register_host(buffer.data, buffer.bytes, true); }),
            "nvidia-peermem (" + reasons + ")"};
  } catch (const Error& error) {
    reasons += std::string("; nvidia-peermem: ") + error.what();
  }
  throw Error(Code::kUnavailable, "register region " + std::to_string(region.id) +
                                      " with rdma: it is memory of CUDA device " + std::to_string(buffer.device) +
                                      " and no way for the NIC to reach it works (" + reasons +
                                      "); load nvidia-peermem (modprobe nvidia_peermem), or use a driver "
                                      "with dma-buf (open kernel modules)");
}

}  // namespace

// NVIDIA CUDA Driver API, cuMemGetHandleForAddressRange: address and size in multiples of the host page size. One
// handle for the whole range, also where it was mapped from many pieces (expandable segments): the driver and the NIC's
// page table take pages that are apart, as UCX (openucx/ucx#11461) and torchcomms (meta-pytorch/torchcomms#3078) found.
DmabufRange export_dmabuf(const Buffer& buffer) {
  const shim::CudaLibrary& cuda = shim::cuda();
  if (!cuda.reason.empty()) throw Error(Code::kUnavailable, cuda.reason);
  if (cuda.api.mem_range_handle == nullptr)
    throw Error(Code::kUnavailable, "the CUDA driver has no cuMemGetHandleForAddressRange (11.7 or later has it)");
  const auto page = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
  const auto address = reinterpret_cast<uint64_t>(buffer.data);
  const uint64_t begin = address / page * page;
  const uint64_t end = (address + buffer.bytes + page - 1) / page * page;
  int fd = -1;
  const shim::CuResult result = cuda.api.mem_range_handle(&fd, begin, end - begin, shim::kCuRangeHandleDmaBuf, 0);
  if (result != shim::kCuSuccess)
    throw Error(Code::kUnavailable, "cuMemGetHandleForAddressRange: " + shim::cuda_error(result), result,
                shim::cuda_error_name(result));
  return {sys::UniqueFd(fd), address - begin};
}

LocalRegion register_region(const Hub& hub, const Region& region) {
  if (region.buffer.device != kHost) return register_device(hub, region);
  return {region.buffer,
          with_every_port(
              hub, region.buffer.bytes,
              [&](const Port& port) { return port.register_host(region.buffer.data, region.buffer.bytes, true); }),
          "host memory"};
}

}  // namespace pdxfer::transport::rdma
