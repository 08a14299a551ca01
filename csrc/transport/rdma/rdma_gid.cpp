// Matching of GIDs and of ports; see rdma_gid.hpp.
#include "transport/rdma/rdma_gid.hpp"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <tuple>

namespace pdxfer::transport::rdma {
namespace {

using sys::GidEntry;
using sys::GidType;
using sys::LinkLayer;

int common_bits(const sys::Gid& a, const sys::Gid& b) {
  int bits = 0;
  for (size_t i = 0; i < a.raw.size(); ++i) {
    const auto differ = static_cast<uint8_t>(a.raw[i] ^ b.raw[i]);
    bits += std::countl_zero(differ);
    if (differ != 0) break;
  }
  return bits;
}

// Proved to be one subnet: both interfaces' prefixes are known, and the longer one agrees.
bool same_subnet(const GidEntry& a, const GidEntry& b) {
  return a.prefix_bits >= 0 && b.prefix_bits >= 0 &&
         common_bits(a.gid, b.gid) >= std::max(a.prefix_bits, b.prefix_bits);
}

Reach reach_infiniband(const GidEntry& a, const GidEntry& b) {
  return common_bits(a.gid, b.gid) >= 64 ? Reach::kSameSubnet : Reach::kRouted;
}

Reach reach_roce(const GidEntry& a, const GidEntry& b) {
  if (a.type != b.type || a.gid.is_ipv4() != b.gid.is_ipv4() || a.gid.is_link_local() != b.gid.is_link_local())
    return Reach::kNone;
  const bool local = a.gid.is_link_local(), known = a.prefix_bits >= 0 && b.prefix_bits >= 0;
  if (a.type == GidType::kRoceV1)  // not routed: another subnet is out of reach
    return local || !known || same_subnet(a, b) ? Reach::kRoceV1 : Reach::kNone;
  if (local) return Reach::kLinkLocal;
  return same_subnet(a, b) ? Reach::kSameSubnet : Reach::kRouted;
}

// Symmetric: both ends must find the same pair. Bigger is better.
auto value_of(Reach reach, const GidEntry& a, const GidEntry& b) {
  return std::tuple(reach, a.gid.is_ipv4() && b.gid.is_ipv4(), reach == Reach::kRouted ? common_bits(a.gid, b.gid) : 0,
                    -(a.index + b.index), -std::max(a.index, b.index), std::max(a.gid.raw, b.gid.raw),
                    std::min(a.gid.raw, b.gid.raw));
}

const char* reach_name(Reach reach) {
  switch (reach) {
    case Reach::kSameSubnet:
      return "same subnet";
    case Reach::kRouted:
      return "other subnet, routed";
    case Reach::kLinkLocal:
      return "link-local";
    case Reach::kRoceV1:
      return "same Ethernet segment only";
    case Reach::kNone:
      break;
  }
  return "unreachable";
}

// What one side's table offers, for the text: "RoCE v2 IPv4, RoCE v1 link-local".
std::string offers(const NicAddress& nic) {
  std::vector<std::string> kinds;
  for (const GidEntry& entry : nic.gids) {
    std::string kind = std::string(sys::gid_type_name(entry.type)) + (entry.gid.is_ipv4() ? " IPv4" : " IPv6") +
                       (entry.gid.is_link_local() ? " link-local" : "");
    if (std::ranges::find(kinds, kind) == kinds.end()) kinds.push_back(std::move(kind));
  }
  std::string text;
  for (const std::string& kind : kinds) text += (text.empty() ? "" : ", ") + kind;
  return text.empty() ? "no GID" : text;
}

std::string why_unreachable(const NicAddress& local, const NicAddress& remote) {
  if (local.layer != remote.layer)
    return std::string(sys::link_layer_name(local.layer)) + " here, " + sys::link_layer_name(remote.layer) +
           " there: the two do not mix";
  std::string text = "no GIDs that reach each other: " + offers(local) + " here, " + offers(remote) + " there";
  if (local.layer == LinkLayer::kEthernet)
    text += "; give both network interfaces addresses of one family (ip addr add), on RoCE v2";
  return text;
}

struct Candidate {
  uint32_t local, remote;
  GidMatch match;
  int value = 0;  // bits in common of routed addresses

  // Smaller is better, and the same for the mirrored candidate at the other end.
  auto order(std::span<const NicAddress> ours, std::span<const NicAddress> theirs) const {
    const int rails = std::abs(static_cast<int>(ours[local].rail) - static_cast<int>(theirs[remote].rail));
    return std::tuple(-static_cast<int>(match.reach), rails, -value, std::min(local, remote), std::max(local, remote));
  }
};

NicPair make_pair(std::span<const NicAddress> ours, std::span<const NicAddress> theirs, const Candidate& candidate) {
  const NicAddress &here = ours[candidate.local], &there = theirs[candidate.remote];
  NicPair pair;
  pair.local = candidate.local;
  pair.remote = candidate.remote;
  pair.local_gid = here.gids[candidate.match.local];
  pair.remote_gid = there.gids[candidate.match.remote];
  pair.reach = candidate.match.reach;
  pair.use_grh = here.layer == LinkLayer::kEthernet || pair.reach != Reach::kSameSubnet;
  pair.dlid = there.lid;
  pair.mtu = std::min(here.mtu, there.mtu);
  pair.why = here.name() + " to " + there.name() + ": " + candidate.match.why;
  return pair;
}

// Takes candidates of `all`, which is in order: first those whose ends are both free, then those with one free end,
// always where the other end carries least.
std::vector<const Candidate*> take(const std::vector<Candidate>& all, size_t ours, size_t theirs) {
  std::vector<uint32_t> load_here(ours), load_there(theirs);
  std::vector<const Candidate*> taken;
  const auto use = [&](const Candidate& one) {
    ++load_here[one.local];
    ++load_there[one.remote];
    taken.push_back(&one);
  };
  for (const Candidate& one : all)
    if (load_here[one.local] == 0 && load_there[one.remote] == 0) use(one);
  for (;;) {
    const Candidate* best = nullptr;
    uint32_t best_load = 0;
    for (const Candidate& one : all) {
      const uint32_t here = load_here[one.local], there = load_there[one.remote];
      if (here != 0 && there != 0) continue;
      if (best == nullptr || here + there < best_load) best = &one, best_load = here + there;
    }
    if (best == nullptr) return taken;
    use(*best);
  }
}

}  // namespace

GidMatch match_gids(const NicAddress& local, const NicAddress& remote) {
  GidMatch best;
  for (uint32_t i = 0; local.layer == remote.layer && i < local.gids.size(); ++i)
    for (uint32_t j = 0; j < remote.gids.size(); ++j) {
      const GidEntry &a = local.gids[i], &b = remote.gids[j];
      const Reach reach = local.layer == LinkLayer::kInfiniband ? reach_infiniband(a, b) : reach_roce(a, b);
      if (reach == Reach::kNone) continue;
      if (best.reach == Reach::kNone ||
          value_of(reach, a, b) > value_of(best.reach, local.gids[best.local], remote.gids[best.remote]))
        best = {reach, i, j, ""};
    }
  if (best.reach == Reach::kNone) {
    best.why = why_unreachable(local, remote);
    return best;
  }
  const GidEntry &a = local.gids[best.local], &b = remote.gids[best.remote];
  best.why = std::string(sys::gid_type_name(a.type)) + ", GID " + std::to_string(a.index) + " " + a.gid.to_string() +
             " to GID " + std::to_string(b.index) + " " + b.gid.to_string() + ", " + reach_name(best.reach);
  return best;
}

Pairing pair_nics(std::span<const NicAddress> ours, std::span<const NicAddress> theirs) {
  std::vector<Candidate> all;
  for (uint32_t i = 0; i < ours.size(); ++i)
    for (uint32_t j = 0; j < theirs.size(); ++j) {
      Candidate one{i, j, match_gids(ours[i], theirs[j]), 0};
      if (one.match.reach == Reach::kNone) continue;
      if (one.match.reach == Reach::kRouted)
        one.value = common_bits(ours[i].gids[one.match.local].gid, theirs[j].gids[one.match.remote].gid);
      all.push_back(std::move(one));
    }
  std::ranges::sort(all, {}, [&](const Candidate& one) { return one.order(ours, theirs); });
  Pairing pairing;
  for (const Candidate* one : take(all, ours.size(), theirs.size()))
    pairing.pairs.push_back(make_pair(ours, theirs, *one));
  std::ranges::sort(pairing.pairs, {}, [](const NicPair& pair) { return std::tuple(pair.local, pair.remote); });
  for (uint32_t i = 0; i < ours.size(); ++i) {
    if (std::ranges::find(pairing.pairs, i, &NicPair::local) != pairing.pairs.end()) continue;
    for (const NicAddress& remote : theirs)
      pairing.refused.push_back(ours[i].name() + " to " + remote.name() + ": " + match_gids(ours[i], remote).why);
  }
  return pairing;
}

}  // namespace pdxfer::transport::rdma
