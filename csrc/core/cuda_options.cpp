// Parsing of Config::cuda; see cuda_options.hpp.
#include "core/cuda_options.hpp"

#include <algorithm>
#include <charconv>
#include <string>
#include <vector>

#include "core/status.hpp"

namespace pdxfer {
namespace {

constexpr std::string_view kKnown = "sm_budget, path or copy_engine, as in sm_budget=16,path=auto";

[[noreturn]] void reject(std::string_view name, std::string_view value, const std::string& want) {
  throw Error(Code::kInvalid, "cuda option " + std::string(name) + "=" + std::string(value) + ": expected " + want);
}

uint32_t number(std::string_view name, std::string_view text, uint32_t low, uint32_t high) {
  uint32_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (text.empty() || error != std::errc{} || end != text.data() + text.size() || value < low || value > high)
    reject(name, text, "a whole number from " + std::to_string(low) + " to " + std::to_string(high));
  return value;
}

void set_option(CudaOptions& options, std::string_view name, std::string_view value) {
  using Path = CudaOptions::Path;
  if (name == "sm_budget") {
    options.sm_budget = number(name, value, 0, 1024);
  } else if (name == "path") {
    if (value != "auto" && value != "map" && value != "staging") reject(name, value, "one of auto, map, staging");
    options.path = value == "map" ? Path::kMap : value == "staging" ? Path::kStaging : Path::kAuto;
  } else if (name == "copy_engine") {
    if (value != "auto" && value != "off") reject(name, value, "one of auto, off");
    options.copy_engine = value == "auto";
  } else {
    throw Error(Code::kInvalid,
                "cuda option \"" + std::string(name) + "\" is not known: expected " + std::string(kKnown));
  }
}

}  // namespace

CudaOptions CudaOptions::parse(std::string_view text) {
  CudaOptions options;
  std::vector<std::string_view> seen;
  while (!text.empty()) {
    const size_t comma = std::min(text.find(','), text.size());
    const std::string_view item = text.substr(0, comma);
    text.remove_prefix(std::min(comma + 1, text.size()));
    const size_t equals = item.find('=');
    const std::string_view name = item.substr(0, equals);
    if (std::ranges::find(seen, name) != seen.end())
      throw Error(Code::kInvalid, "cuda option " + std::string(name) + " is given twice");
    seen.push_back(name);
    if (equals == std::string_view::npos)
      throw Error(Code::kInvalid, "cuda option \"" + std::string(item) + "\" has no '=': expected NAME=VALUE with " +
                                      std::string(kKnown));
    set_option(options, name, item.substr(equals + 1));
  }
  return options;
}

}  // namespace pdxfer
