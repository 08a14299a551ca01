// RdmaOptions: Config::rdma taken apart, "devices=mlx5_0;mlx5_1,gid=3,tc=106". Pure; called by Config::validate and by
// whoever makes an rdma transport. Every default works without being told: a field at its default means "choose".
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace pdxfer {

struct RdmaOptions {
  // How bytes go: what the cost model says, always straight from and into pages, or always packed through staging.
  enum class Path : uint8_t { kAuto, kDirect, kPacked };

  std::vector<std::string> devices;  // "mlx5_0" (every port of it) or "mlx5_0:1"; empty: the nearest usable ports
  int gpu = -1;                      // CUDA ordinal whose NICs are wanted; -1: host memory, any NIC
  int gid = -1;                      // index in our GID tables; -1: chosen per peer
  std::optional<uint16_t> pkey;      // partition; by default the first of the port's table
  uint8_t service_level = 0;         // InfiniBand SL, 0..15
  uint8_t traffic_class = 0;         // RoCE: DSCP * 4 + ECN bits; InfiniBand: GRH traffic class
  uint32_t mtu = 0;                  // bytes, upper bound of the path MTU; 0: what both ports have
  uint8_t timeout = 14;              // local ACK timeout, 4.096 us * 2^timeout: 67 ms
  uint8_t retry = 6;                 // transport retries; 7 is "for ever" on some devices, so it is not the default
  uint8_t rnr_retry = 7;             // receiver-not-ready retries; 7: for ever, bounded by peer_timeout_ms
  uint32_t queue_pairs = 2;          // per pair of NICs
  Path path = Path::kAuto;

  // Throws Error(kInvalid) that names the option and what it allows.
  static RdmaOptions parse(std::string_view text);
};

}  // namespace pdxfer
