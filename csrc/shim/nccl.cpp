// Loading of NCCL; see nccl.hpp.
#include "shim/nccl.hpp"

namespace pdxfer::shim {
namespace {
constexpr std::string_view kSoname = "libnccl.so.2";

DynamicLibrary open(std::string_view wheel_file) {
  // The loaded-already test goes by soname; the wheel's file comes before the system's.
  return wheel_file.empty() ? DynamicLibrary({kSoname}) : DynamicLibrary({wheel_file, kSoname});
}
}  // namespace

NcclLibrary load_nccl(std::string_view wheel_file) {
  NcclLibrary nccl{open(wheel_file), 0, {}};
  nccl.reason = nccl.library.reason();
  if (!nccl.library.present()) return nccl;
  int (*get_version)(int*) = nullptr;
  if (!nccl.library.load(get_version, "ncclGetVersion") || get_version(&nccl.version) != 0) {
    nccl.reason = nccl.library.path() + " does not answer ncclGetVersion";
    nccl.library.reject(nccl.reason);
  }
  return nccl;
}

}  // namespace pdxfer::shim
