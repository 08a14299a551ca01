// _core's functions for `pdxfer doctor` and the GPU self-test: facts as dicts; python/pdxfer/doctor.py judges them.
// Called with the GIL held from any Python thread; what can wait releases it.
#include <pybind11/stl.h>

#include <string>

#include "bindings/bindings.hpp"
#include "engine/registry.hpp"
#include "pack/device_code.hpp"
#include "pack/device_selftest.hpp"
#include "shim/cuda.hpp"
#include "shim/nccl.hpp"
#include "shim/verbs.hpp"
#include "sys/topology.hpp"

namespace py = pybind11;

namespace pdxfer {
namespace {

template <typename Function>
auto without_gil(Function&& function) {
  const py::gil_scoped_release release;
  return function();
}

py::dict build_info() {
  py::dict info;
  info["version"] = PDXFER_VERSION;
#ifdef __clang__
  info["compiler"] = __VERSION__;
#else
  info["compiler"] = "GCC " __VERSION__;
#endif
#ifdef NDEBUG
  info["assertions"] = false;
#else
  info["assertions"] = true;
#endif
  info["glibc"] = std::to_string(__GLIBC__) + "." + std::to_string(__GLIBC_MINOR__);
  return info;
}

py::dict device_code() {
  const pack::DeviceCode& code = pack::device_code();
  py::list archs;
  py::object ptx_arch = py::none();
  size_t bytes = 0;
  for (const pack::DeviceImage& image : code.images) {
    bytes += image.bytes;
    if (image.ptx)
      ptx_arch = py::int_(image.arch);
    else
      archs.append(image.arch);
  }
  py::dict info;
  info["present"] = !code.images.empty();
  info["compiler"] = code.compiler;
  info["version"] = code.version;
  info["archs"] = archs;
  info["ptx_arch"] = ptx_arch;
  info["ptx_version"] = code.ptx_version;
  info["bytes"] = bytes;
  info["reason"] = code.reason;
  return info;
}

py::dict library(const shim::DynamicLibrary& lib, const std::string& reason) {
  py::dict info;
  info["present"] = lib.present();
  info["path"] = lib.path();
  info["already_loaded"] = lib.already_loaded();
  info["reason"] = reason;
  return info;
}

py::dict cuda_info() {
  const shim::CudaLibrary& cuda = without_gil([]() -> const shim::CudaLibrary& { return shim::cuda(); });
  py::dict info = library(cuda.library, cuda.reason);
  info["driver_version"] = cuda.driver_version;
  py::list devices;
  for (const sys::Gpu& gpu : without_gil([] { return sys::list_gpus(); })) {
    py::dict device;
    device["ordinal"] = gpu.ordinal;
    device["name"] = gpu.name;
    device["capability"] = std::to_string(gpu.major) + "." + std::to_string(gpu.minor);
    device["multiprocessors"] = gpu.multiprocessors;
    device["bytes"] = gpu.bytes;
    device["pci"] = gpu.pci;
    device["peers"] = gpu.peers;
    const pack::DeviceImage* image = pack::pick_image(gpu.major, gpu.minor);
    device["image"] = image == nullptr ? std::string() : (image->ptx ? "PTX " : "sm_") + std::to_string(image->arch);
    devices.append(device);
  }
  info["devices"] = devices;
  return info;
}

py::dict verbs_info() {
  const shim::VerbsLibrary verbs = without_gil([] { return shim::load_verbs(); });
  py::dict info = library(verbs.library, verbs.reason);
  info["devices"] = verbs.devices;
  return info;
}

py::dict nccl_info(const std::string& wheel_file) {
  const shim::NcclLibrary nccl = without_gil([&] { return shim::load_nccl(wheel_file); });
  py::dict info = library(nccl.library, nccl.reason);
  info["version"] = nccl.version;
  return info;
}

py::dict probe_kernel() {
  py::dict all;
  for (const sys::Probe& probe : without_gil([] { return sys::probe_kernel(); })) {
    py::dict one;
    one["works"] = probe.works;
    one["detail"] = probe.detail;
    all[py::str(probe.name)] = one;
  }
  return all;
}

py::list transports() {
  py::list all;
  for (const engine::Entry& entry : engine::registry()) {
    py::dict one;
    one["name"] = entry.name;
    one["summary"] = entry.summary;
    one["automatic"] = entry.automatic;
    all.append(one);
  }
  return all;
}

py::dict selftest(uint64_t seed, uint32_t cases, int device) {
  const pack::SelfTestResult result = without_gil([&] { return pack::device_selftest(device, seed, cases); });
  py::dict info;
  info["cases"] = result.cases;
  info["bytes"] = result.bytes;
  info["failure"] = result.failure;
  return info;
}

}  // namespace

void bind_doctor(py::module_& module) {
  module.def("build_info", &build_info, "How this module was built: version, compiler, assertions, glibc.");
  module.def("device_code", &device_code, "The device code inside this module, or the reason why there is none.");
  module.def("transports", &transports, "The transports of this build, in order of preference.");
  module.def("cuda_info", &cuda_info, "The CUDA driver and the GPUs that it lists to this process.");
  module.def("verbs_info", &verbs_info, "libibverbs and the RDMA devices whose provider it loaded.");
  module.def("nccl_info", &nccl_info, py::arg("wheel_file") = "",
             "NCCL: in this process, the wheel's file, the system's.");
  module.def("probe_kernel", &probe_kernel, "What the kernel lets this process do, found by trying.");
  module.def("device_paged_copy_selftest", &selftest, py::arg("seed"), py::arg("cases"), py::arg("device") = 0,
             "Random copies by the kernel on a GPU against the CPU; `failure` is empty when all bytes agree.");
}

}  // namespace pdxfer
