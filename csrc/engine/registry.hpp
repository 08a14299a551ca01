// The transports of this build, by name, in order of preference. Adding one is a folder under transport/ and a line in
// registry.cpp.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "transport/transport.hpp"

namespace pdxfer::engine {

struct Entry {
  const char* name;
  const char* summary;  // one line for doctor
  bool automatic;       // part of "auto"
  std::unique_ptr<transport::Transport> (*make)(transport::Context context);
};

const std::vector<Entry>& registry();
// Config::transports as names in order. Throws Error(kInvalid) naming an unknown one and the known.
std::vector<std::string> parse_transports(std::string_view text);

}  // namespace pdxfer::engine
