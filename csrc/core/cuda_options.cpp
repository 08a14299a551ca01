// Parsing of Config::cuda; see cuda_options.hpp.
#include "core/cuda_options.hpp"

#include "core/option_list.hpp"

namespace pdxfer {
namespace {

constexpr OptionKind kCuda{"cuda", "sm_budget, path, copy_engine or checksum, as in sm_budget=16,path=auto"};

void set_option(CudaOptions& options, std::string_view name, std::string_view value) {
  using Path = CudaOptions::Path;
  if (name == "sm_budget") {
    options.sm_budget = kCuda.number(name, value, 0, 1024);
  } else if (name == "path") {
    if (value != "auto" && value != "map" && value != "staging") kCuda.reject(name, value, "one of auto, map, staging");
    options.path = value == "map" ? Path::kMap : value == "staging" ? Path::kStaging : Path::kAuto;
  } else if (name == "copy_engine") {
    if (value != "auto" && value != "off") kCuda.reject(name, value, "one of auto, off");
    options.copy_engine = value == "auto";
  } else if (name == "checksum") {
    if (value != "on" && value != "off") kCuda.reject(name, value, "one of on, off");
    options.checksum = value == "on";
  } else {
    kCuda.reject_unknown(name);
  }
}

}  // namespace

CudaOptions CudaOptions::parse(std::string_view text) {
  CudaOptions options;
  kCuda.parse(text, [&](std::string_view name, std::string_view value) { set_option(options, name, value); });
  return options;
}

}  // namespace pdxfer
