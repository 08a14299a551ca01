// Which of our ports talks to which of the peer's, and with which GIDs. Pure; both ends compute the same pairs from the
// two addresses, mirrored, so nothing is negotiated. Called at set-up on any thread and by doctor; owns nothing.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "transport/rdma/rdma_nic.hpp"

namespace pdxfer::transport::rdma {

// How two GIDs reach each other, best last.
enum class Reach : uint8_t { kNone, kRoceV1, kLinkLocal, kRouted, kSameSubnet };

struct GidMatch {
  Reach reach = Reach::kNone;
  uint32_t local = 0, remote = 0;  // into the two lists of GIDs
  std::string why;                 // the choice in words; with kNone: why none serves, and what to do
};

// The best pair of GIDs: same subnet over routed over link-local, RoCE v2 over v1, IPv4 over IPv6, low indexes.
GidMatch match_gids(const NicAddress& local, const NicAddress& remote);

struct NicPair {
  uint32_t local = 0, remote = 0;  // into the two lists of ports
  sys::GidEntry local_gid, remote_gid;
  bool use_grh = false;  // always on RoCE; on InfiniBand between subnets
  uint16_t dlid = 0;     // InfiniBand
  uint32_t mtu = 0;      // bytes
  Reach reach = Reach::kNone;
  std::string why;  // "mlx5_0 port 1 to mlx5_0 port 1: RoCE v2, ::ffff:10.0.0.1 to ::ffff:10.0.0.2, same subnet"
};

struct Pairing {
  std::vector<NicPair> pairs;        // by local, then remote
  std::vector<std::string> refused;  // pairs that cannot reach each other; only filled for ports left without a pair
};

// Every port that reaches one of the other side is in a pair. One to one first: best reach, then the same rail (then
// the nearest); ports left over on the longer side share the least loaded port of the other.
Pairing pair_nics(std::span<const NicAddress> ours, std::span<const NicAddress> theirs);

}  // namespace pdxfer::transport::rdma
