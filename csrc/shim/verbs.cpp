// Loading of libibverbs; see verbs.hpp.
#include "shim/verbs.hpp"

#include <cerrno>

#include "core/status.hpp"

namespace pdxfer::shim {

VerbsLibrary load_verbs() {
  struct Device;  // opaque: only names are asked for
  VerbsLibrary verbs{DynamicLibrary({"libibverbs.so.1"}), {}, {}};
  verbs.reason = verbs.library.reason();
  if (!verbs.library.present()) return verbs;

  Device** (*get_list)(int*) = nullptr;
  void (*free_list)(Device**) = nullptr;
  const char* (*get_name)(Device*) = nullptr;
  if (!verbs.library.load(get_list, "ibv_get_device_list") || !verbs.library.load(free_list, "ibv_free_device_list") ||
      !verbs.library.load(get_name, "ibv_get_device_name")) {
    verbs.reason = verbs.library.path() + " lacks ibv_get_device_list: not a libibverbs";
    verbs.library.reject(verbs.reason);
    return verbs;
  }
  int count = 0;
  errno = 0;
  Device** list = get_list(&count);
  if (list == nullptr) {
    verbs.reason = "ibv_get_device_list: " + errno_name(errno);
    return verbs;
  }
  for (int i = 0; i < count; ++i) verbs.devices.emplace_back(get_name(list[i]));
  free_list(list);
  if (verbs.devices.empty())
    verbs.reason = "libibverbs lists no device: no RDMA NIC here, or its kernel driver or provider is not installed";
  return verbs;
}

}  // namespace pdxfer::shim
