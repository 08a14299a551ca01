// Parsing of Config::rdma; see rdma_options.hpp.
#include "core/rdma_options.hpp"

#include <algorithm>
#include <array>

#include "core/option_list.hpp"

namespace pdxfer {
namespace {

constexpr OptionKind kRdma{
    "rdma",
    "devices, gpu, gid, pkey, sl, tc, mtu, timeout, retry, rnr_retry, qps or path, as in devices=mlx5_0;mlx5_1,gid=3"};

std::vector<std::string> device_list(std::string_view text) {
  static constexpr std::string_view kWant = "device names separated by ';', such as mlx5_0 or mlx5_0:1;mlx5_1";
  std::vector<std::string> names;
  for (std::string_view rest = text;;) {
    const size_t end = std::min(rest.find(';'), rest.size());
    const std::string_view name = rest.substr(0, end);
    const size_t colon = name.find(':');
    const auto plain = [](char c) {
      return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '-' ||
             c == '.';
    };
    const std::string_view device = name.substr(0, std::min(colon, name.size()));
    if (device.empty() || !std::ranges::all_of(device, plain)) kRdma.reject("devices", text, kWant);
    if (colon != std::string_view::npos) (void)kRdma.number("devices port", name.substr(colon + 1), 1, 255);
    if (std::ranges::find(names, name) != names.end())
      kRdma.reject("devices", text, "each device once; " + std::string(name) + " is there twice");
    names.emplace_back(name);
    if (end == rest.size()) return names;
    rest.remove_prefix(end + 1);
  }
}

uint32_t path_mtu(std::string_view text) {
  static constexpr std::array<std::string_view, 5> kSizes{"256", "512", "1024", "2048", "4096"};
  if (std::ranges::find(kSizes, text) == kSizes.end()) kRdma.reject("mtu", text, "one of 256, 512, 1024, 2048, 4096");
  return kRdma.number("mtu", text, 256, 4096);
}

RdmaOptions::Path path_of(std::string_view text) {
  if (text == "auto") return RdmaOptions::Path::kAuto;
  if (text == "direct") return RdmaOptions::Path::kDirect;
  if (text == "packed") return RdmaOptions::Path::kPacked;
  kRdma.reject("path", text, "one of auto, direct, packed");
}

void set_option(RdmaOptions& options, std::string_view name, std::string_view value) {
  const auto byte = [&](uint32_t low, uint32_t high) {
    return static_cast<uint8_t>(kRdma.number(name, value, low, high));
  };
  if (name == "devices") {
    options.devices = device_list(value);
  } else if (name == "gpu") {
    options.gpu = static_cast<int>(kRdma.number(name, value, 0, 1023));
  } else if (name == "gid") {
    options.gid = value == "auto" ? -1 : static_cast<int>(kRdma.number(name, value, 0, 65535));
  } else if (name == "pkey") {
    options.pkey = static_cast<uint16_t>(kRdma.number(name, value, 1, 0xffff));
  } else if (name == "sl") {
    options.service_level = byte(0, 15);
  } else if (name == "tc") {
    options.traffic_class = byte(0, 255);
  } else if (name == "mtu") {
    options.mtu = path_mtu(value);
  } else if (name == "timeout") {
    options.timeout = byte(1, 31);
  } else if (name == "retry") {
    options.retry = byte(0, 7);
  } else if (name == "rnr_retry") {
    options.rnr_retry = byte(0, 7);
  } else if (name == "qps") {
    options.queue_pairs = kRdma.number(name, value, 1, 64);
  } else if (name == "path") {
    options.path = path_of(value);
  } else {
    kRdma.reject_unknown(name);
  }
}

}  // namespace

RdmaOptions RdmaOptions::parse(std::string_view text) {
  RdmaOptions options;
  kRdma.parse(text, [&](std::string_view name, std::string_view value) { set_option(options, name, value); });
  return options;
}

}  // namespace pdxfer
