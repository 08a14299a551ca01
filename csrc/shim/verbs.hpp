// libibverbs, loaded at run time: so far what `pdxfer doctor` asks of it. Any thread; the handle stays for the life of
// the process. Nothing is linked: even the inline functions of infiniband/verbs.h leave undefined symbols behind.
#pragma once

#include <string>
#include <vector>

#include "shim/dynamic_library.hpp"

namespace pdxfer::shim {

struct VerbsLibrary {
  DynamicLibrary library;
  std::vector<std::string> devices;  // as ibv_get_device_list names them: those whose provider loaded
  std::string reason;                // why no device can be used; empty when one can
};

VerbsLibrary load_verbs();

}  // namespace pdxfer::shim
