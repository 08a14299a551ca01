// NCCL, loaded at run time: so far what `pdxfer doctor` asks of it. Any thread; the handle stays for the life of the
// process.
#pragma once

#include <string>
#include <string_view>

#include "shim/dynamic_library.hpp"

namespace pdxfer::shim {

struct NcclLibrary {
  DynamicLibrary library;
  int version = 0;     // 22809 for 2.28.9
  std::string reason;  // why it cannot be used; empty when it can
};

// One that the process already holds (torch's), then the nvidia-nccl wheel's file (empty: none), then the system's.
NcclLibrary load_nccl(std::string_view wheel_file);

}  // namespace pdxfer::shim
