// Tables and launch of the device kernel; see paged_copy_device.hpp.
#include "pack/paged_copy_device.hpp"

#include <algorithm>
#include <string>

#include "core/log.hpp"
#include "pack/device_code.hpp"
#include "sys/cuda_memory.hpp"

namespace pdxfer::pack {

DeviceTables device_tables(const PagedCopy& copy, std::span<const uint64_t> src, std::span<const uint64_t> dst) {
  DeviceTables tables;
  tables.pairs.reserve(copy.pairs.size());
  tables.runs.reserve(copy.runs.size());
  for (size_t i = 0; i < copy.pairs.size(); ++i) {
    const RegionPair& p = copy.pairs[i];
    tables.pairs.push_back({src[i] + p.src_offset, dst[i] + p.dst_offset, p.src_stride, p.dst_stride, p.slot_bytes});
    tables.pieces = std::max<uint64_t>(tables.pieces, (p.slot_bytes + kPieceBytes - 1) / kPieceBytes);
  }
  for (const Run& r : copy.runs) {
    tables.runs.push_back({r.src_slot, r.dst_slot, tables.slots});
    tables.slots += r.count;
  }
  return tables;
}

struct DevicePagedCopy::State {
  explicit State(int ordinal) : context(ordinal) {}
  ~State() {
    if (module == nullptr) return;
    try {
      const sys::CudaScope scope(context);
      shim::cuda_check(shim::cuda().api.module_unload(module), "cuModuleUnload");
    } catch (const Error& error) {
      log(LogLevel::kWarning, error.what());
    }
  }
  State(const State&) = delete;
  State& operator=(const State&) = delete;

  sys::CudaContext context;
  shim::CuModule module = nullptr;
  shim::CuFunction kernel = nullptr;
};

DevicePagedCopy::DevicePagedCopy(int ordinal) : state_(std::make_unique<State>(ordinal)) {
  const DeviceCode& code = device_code();
  if (code.images.empty())
    throw Error(Code::kUnavailable, std::string("this build of pdxfer has no device code: ") + code.reason);
  const int major = state_->context.attribute(shim::kCuAttributeMajor);
  const int minor = state_->context.attribute(shim::kCuAttributeMinor);
  const DeviceImage* image = pick_image(major, minor);
  if (image == nullptr)
    throw Error(Code::kUnavailable, "no device code for compute capability " + std::to_string(major) + "." +
                                        std::to_string(minor) + ": pdxfer needs 8.0 or later");
  const sys::CudaScope scope(state_->context);
  const shim::CudaDriver& api = shim::cuda().api;
  const std::string what = std::string("cuModuleLoadData of ") + (image->ptx ? "PTX " : "sm_") +
                           (image->ptx ? code.ptx_version : std::to_string(image->arch)) + " built by " +
                           code.compiler + " " + code.version;
  shim::cuda_check(api.module_load_data(&state_->module, image->data), what.c_str());
  shim::cuda_check(api.module_get_function(&state_->kernel, state_->module, "pdx_paged_copy"), "cuModuleGetFunction");
}

DevicePagedCopy::~DevicePagedCopy() = default;

void DevicePagedCopy::run(const DeviceTables& tables, unsigned blocks) {
  if (tables.pairs.empty() || tables.runs.empty()) return;
  const sys::CudaScope scope(state_->context);
  const sys::CudaMemory pairs(std::as_bytes(std::span(tables.pairs)));
  const sys::CudaMemory runs(std::as_bytes(std::span(tables.runs)));
  PagedCopyArgs copy{};
  copy.pairs = reinterpret_cast<const DevicePair*>(pairs.get());
  copy.runs = reinterpret_cast<const DeviceRun*>(runs.get());
  copy.slots = tables.slots;
  copy.pieces = tables.pieces;
  copy.pair_count = static_cast<unsigned>(tables.pairs.size());
  copy.run_count = static_cast<unsigned>(tables.runs.size());
  void* parameters[] = {&copy};
  const shim::CudaDriver& api = shim::cuda().api;
  shim::cuda_check(
      api.launch_kernel(state_->kernel, blocks, 1, 1, kBlockThreads, 1, 1, 0, nullptr, parameters, nullptr),
      "cuLaunchKernel of pdx_paged_copy");
  shim::cuda_check(api.stream_synchronize(nullptr), "pdx_paged_copy");
}

}  // namespace pdxfer::pack
