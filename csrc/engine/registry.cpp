// See registry.hpp.
#include "engine/registry.hpp"

#include <algorithm>

#include "transport/cuda_ipc/cuda_ipc_transport.hpp"
#include "transport/loopback/loopback_transport.hpp"
#include "transport/rdma/rdma_transport.hpp"
#include "transport/shm/shm_transport.hpp"
#include "transport/tcp/tcp_transport.hpp"

namespace pdxfer::engine {

const std::vector<Entry>& registry() {
  static const std::vector<Entry>& entries = *new std::vector<Entry>{
      {"cuda_ipc", "device memory between processes of one machine", true, &transport::make_cuda_ipc},
      {"shm", "host memory between processes of one machine", true, &transport::make_shm},
      {"rdma", "memory between machines, by their RDMA network cards", true, &transport::make_rdma},
      {"tcp", "host memory between machines", true, &transport::make_tcp},
      {"loopback", "within one process: the model of the seam, for tests", false, &transport::make_loopback},
  };
  return entries;
}

std::vector<std::string> parse_transports(std::string_view text) {
  std::vector<std::string> names;
  std::string known;
  for (const Entry& entry : registry()) {
    known += (known.empty() ? "" : ", ") + std::string(entry.name);
    if (text == "auto" && entry.automatic) names.emplace_back(entry.name);
  }
  if (text == "auto") return names;
  while (!text.empty()) {
    const size_t comma = std::min(text.find(','), text.size());
    const std::string name(text.substr(0, comma));
    text.remove_prefix(std::min(comma + 1, text.size()));
    const bool exists = std::ranges::any_of(registry(), [&](const Entry& entry) { return name == entry.name; });
    if (!exists || std::ranges::find(names, name) != names.end())
      throw Error(Code::kInvalid, "transports: \"" + name + "\" is " + (exists ? "named twice" : "not known") +
                                      "; use auto or a comma-separated list of " + known);
    names.push_back(name);
  }
  return names;
}

}  // namespace pdxfer::engine
