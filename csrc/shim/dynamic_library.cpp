// dlopen and what it leaves to know; see dynamic_library.hpp.
#include "shim/dynamic_library.hpp"

#include <dlfcn.h>
#include <limits.h>
#include <link.h>
#include <stdlib.h>

#include <utility>

namespace pdxfer::shim {
namespace {

std::string path_of(void* handle) {
  link_map* map = nullptr;
  if (::dlinfo(handle, RTLD_DI_LINKMAP, &map) != 0 || map == nullptr || map->l_name == nullptr) return {};
  char resolved[PATH_MAX];
  return ::realpath(map->l_name, resolved) != nullptr ? resolved : map->l_name;
}

}  // namespace

DynamicLibrary::DynamicLibrary(std::initializer_list<std::string_view> names) {
  for (const int extra : {RTLD_NOLOAD, 0}) {
    for (const std::string_view name : names) {
      if (handle_ != nullptr || name.empty()) continue;
      // Local: a library that we open must not answer for symbols of libraries that others open.
      handle_ = ::dlopen(std::string(name).c_str(), RTLD_NOW | RTLD_LOCAL | extra);
      if (handle_ != nullptr) {
        already_loaded_ = extra == RTLD_NOLOAD;
      } else if (extra == 0) {
        const char* said = ::dlerror();
        reason_ += (reason_.empty() ? "" : "; ") + std::string(said != nullptr ? said : name);
      }
    }
  }
  if (handle_ == nullptr) return;
  path_ = path_of(handle_);
  reason_.clear();
}

void DynamicLibrary::reject(std::string reason) {
  handle_ = nullptr;  // not dlclose: another owner may have handed out its functions
  reason_ = std::move(reason);
}

void* DynamicLibrary::find(const char* symbol) const noexcept {
  return handle_ == nullptr ? nullptr : ::dlsym(handle_, symbol);
}

}  // namespace pdxfer::shim
