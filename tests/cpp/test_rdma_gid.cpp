// Matching of GIDs and pairing of ports: what reaches what, rails, unequal numbers, and that both ends agree.
#include <arpa/inet.h>
#include <doctest/doctest.h>

#include <algorithm>
#include <random>
#include <string>

#include "transport/rdma/rdma_gid.hpp"

using namespace pdxfer::transport::rdma;
using pdxfer::sys::GidEntry;
using pdxfer::sys::GidType;
using pdxfer::sys::LinkLayer;

namespace {

bool has(const std::string& text, std::string_view part) { return text.find(part) != std::string::npos; }

GidEntry gid(int index, const std::string& text, GidType type = GidType::kRoceV2, int prefix = -1) {
  GidEntry entry;
  entry.index = index;
  entry.type = type;
  entry.prefix_bits = prefix;
  REQUIRE(::inet_pton(AF_INET6, text.c_str(), entry.gid.raw.data()) == 1);
  return entry;
}

NicAddress nic(int rail, std::vector<GidEntry> gids, LinkLayer layer = LinkLayer::kEthernet) {
  NicAddress one;
  one.device = "mlx5_" + std::to_string(rail);
  one.layer = layer;
  one.rail = static_cast<uint16_t>(rail);
  one.lid = static_cast<uint16_t>(100 + rail);
  one.mtu = 4096;
  one.gids = std::move(gids);
  return one;
}

// A rail's port: every rail is a subnet of its own, as rail-optimised fabrics are built.
NicAddress rail(int number, int host) {
  const std::string last = std::to_string(host);
  return nic(number, {gid(0, "fe80::" + last, GidType::kRoceV1, 64), gid(1, "fe80::" + last, GidType::kRoceV2, 64),
                      gid(2, "::ffff:10.0." + std::to_string(number) + "." + last, GidType::kRoceV1, 120),
                      gid(3, "::ffff:10.0." + std::to_string(number) + "." + last, GidType::kRoceV2, 120)});
}

std::string pairs(const Pairing& pairing) {
  std::string text;
  for (const NicPair& pair : pairing.pairs)
    text += (text.empty() ? "" : " ") + std::to_string(pair.local) + "-" + std::to_string(pair.remote);
  return text;
}

std::vector<NicAddress> rails(int count, int host) {
  std::vector<NicAddress> all;
  for (int i = 0; i < count; ++i) all.push_back(rail(i, host));
  return all;
}

}  // namespace

TEST_CASE("RoCE v2 with a routable address of one subnet comes first") {
  const GidMatch match = match_gids(rail(0, 1), rail(0, 2));
  CHECK(match.reach == Reach::kSameSubnet);
  CHECK(match.local == 3);
  CHECK(match.remote == 3);
  CHECK(has(match.why, "RoCE v2, GID 3 ::ffff:10.0.0.1 to GID 3 ::ffff:10.0.0.2, same subnet"));
}

TEST_CASE("routed over link-local, link-local over RoCE v1, and v1 not across subnets") {
  const GidEntry local = gid(1, "fe80::1", GidType::kRoceV2, 64), far = gid(1, "fe80::2", GidType::kRoceV2, 64);
  const GidEntry v4 = gid(3, "::ffff:10.1.0.1", GidType::kRoceV2, 120);
  const GidEntry other = gid(3, "::ffff:10.2.0.1", GidType::kRoceV2, 120);
  CHECK(match_gids(nic(0, {local, v4}), nic(0, {far, other})).reach == Reach::kRouted);
  CHECK(match_gids(nic(0, {local, v4}), nic(0, {far})).reach == Reach::kLinkLocal);
  CHECK(match_gids(nic(0, {local}), nic(0, {other})).reach == Reach::kNone);
  const GidEntry v1 = gid(2, "::ffff:10.1.0.1", GidType::kRoceV1, 120);
  CHECK(match_gids(nic(0, {v1}), nic(0, {gid(2, "::ffff:10.1.0.9", GidType::kRoceV1, 120)})).reach == Reach::kRoceV1);
  CHECK(match_gids(nic(0, {v1}), nic(0, {gid(2, "::ffff:10.2.0.9", GidType::kRoceV1, 120)})).reach == Reach::kNone);
  CHECK(match_gids(nic(0, {v1, local}), nic(0, {gid(2, "::ffff:10.1.0.9", GidType::kRoceV1, 120), far})).local == 1);
}

TEST_CASE("the address family that both have, the subnet that both are in") {
  const GidEntry v6 = gid(5, "2001:db8::1", GidType::kRoceV2, 64),
                 v4 = gid(3, "::ffff:10.1.0.1", GidType::kRoceV2, 120);
  const GidMatch six = match_gids(nic(0, {v4, v6}), nic(0, {gid(2, "2001:db8::2", GidType::kRoceV2, 64)}));
  CHECK(six.local == 1);
  CHECK(six.reach == Reach::kSameSubnet);
  // A VLAN's GID, where the base interfaces are in different subnets.
  const GidEntry vlan = gid(7, "::ffff:172.16.5.1", GidType::kRoceV2, 120);
  const GidMatch match = match_gids(nic(0, {v4, vlan}), nic(0, {gid(3, "::ffff:10.2.0.2", GidType::kRoceV2, 120),
                                                                gid(9, "::ffff:172.16.5.2", GidType::kRoceV2, 120)}));
  CHECK(match.local == 1);
  CHECK(match.remote == 1);
  // Not proved to be one subnet (prefixes unknown): the most similar addresses.
  const GidMatch near =
      match_gids(nic(0, {gid(3, "::ffff:10.1.0.1"), gid(4, "::ffff:10.9.0.1")}), nic(0, {gid(3, "::ffff:10.9.0.2")}));
  CHECK(near.local == 1);
  CHECK(near.reach == Reach::kRouted);
}

TEST_CASE("a pair that cannot reach each other is explained") {
  const GidEntry v4 = gid(3, "::ffff:10.1.0.1");
  CHECK(has(match_gids(nic(0, {v4}), nic(0, {gid(1, "2001:db8::2")})).why,
            "RoCE v2 IPv4 here, RoCE v2 IPv6 there; give both network interfaces addresses of one family"));
  CHECK(has(match_gids(nic(0, {v4}), nic(0, {gid(1, "fe80::2")})).why, "RoCE v2 IPv6 link-local there"));
  CHECK(has(match_gids(nic(0, {v4}), nic(0, {gid(0, "fe80::2", GidType::kInfiniband)}, LinkLayer::kInfiniband)).why,
            "Ethernet here, InfiniBand there"));
  const Pairing pairing = pair_nics(std::vector{nic(0, {v4})}, std::vector{nic(4, {gid(1, "2001:db8::2")})});
  CHECK(pairing.pairs.empty());
  REQUIRE(pairing.refused.size() == 1);
  CHECK(has(pairing.refused[0], "mlx5_0 port 1 to mlx5_4 port 1: no GIDs that reach each other"));
}

TEST_CASE("InfiniBand: by LID within a subnet, with a GRH between subnets") {
  const auto ib = [](int number, const std::string& text) {
    return nic(number, {gid(0, text, GidType::kInfiniband, 64)}, LinkLayer::kInfiniband);
  };
  Pairing pairing = pair_nics(std::vector{ib(0, "fe80::1")}, std::vector{ib(2, "fe80::2")});
  REQUIRE(pairing.pairs.size() == 1);
  CHECK_FALSE(pairing.pairs[0].use_grh);
  CHECK(pairing.pairs[0].dlid == 102);
  pairing = pair_nics(std::vector{ib(0, "fec0::1")}, std::vector{ib(0, "fec0:0:0:1::2")});
  REQUIRE(pairing.pairs.size() == 1);
  CHECK(pairing.pairs[0].use_grh);
}

TEST_CASE("rails pair up") {
  CHECK(pairs(pair_nics(rails(8, 1), rails(8, 2))) == "0-0 1-1 2-2 3-3 4-4 5-5 6-6 7-7");
  // In the other order in the list, still the same rail.
  std::vector<NicAddress> theirs = rails(4, 2);
  std::ranges::reverse(theirs);
  CHECK(pairs(pair_nics(rails(4, 1), theirs)) == "0-3 1-2 2-1 3-0");
  // Flat fabric, one subnet for all: the rail decides.
  const auto flat = [](int number, int host) {
    return nic(number, {gid(3, "::ffff:10.0." + std::to_string(host) + "." + std::to_string(number + 1),
                            GidType::kRoceV2, 112)});
  };
  const Pairing pairing = pair_nics(std::vector{flat(0, 1), flat(1, 1)}, std::vector{flat(1, 2), flat(0, 2)});
  CHECK(pairs(pairing) == "0-1 1-0");
  CHECK(pairing.pairs[0].use_grh);
  CHECK(pairing.pairs[0].mtu == 4096);
}

TEST_CASE("unequal numbers: none is left idle, the load is even") {
  const auto flat = [](int count, int host) {
    std::vector<NicAddress> all;
    for (int i = 0; i < count; ++i)
      all.push_back(
          nic(i, {gid(3, "::ffff:10.0." + std::to_string(host) + "." + std::to_string(i + 1), GidType::kRoceV2, 112)}));
    return all;
  };
  CHECK(pairs(pair_nics(flat(4, 1), flat(2, 2))) == "0-0 1-1 2-1 3-0");
  CHECK(pairs(pair_nics(flat(1, 1), flat(3, 2))) == "0-0 0-1 0-2");
  CHECK(pair_nics({}, flat(3, 2)).pairs.empty());
}

TEST_CASE("both ends find the same pairs, mirrored") {
  std::mt19937 random(20260611);
  const auto pick = [&](int limit) { return static_cast<int>(random() % static_cast<unsigned>(limit)); };
  for (int round = 0; round < 400; ++round) {
    const auto side = [&](int host) {
      std::vector<NicAddress> all(static_cast<size_t>(1 + pick(6)));
      for (size_t i = 0; i < all.size(); ++i) {
        std::vector<GidEntry> gids;
        for (int g = 0, count = pick(4); g < count; ++g) {
          const std::string last = std::to_string(host * 100 + g * 10 + pick(9) + 1);
          const GidType type = pick(3) == 0 ? GidType::kRoceV1 : GidType::kRoceV2;
          const int kind = pick(3);
          const std::string net = std::to_string(pick(2));
          gids.push_back(kind == 0   ? gid(g, "::ffff:10.0." + net + "." + last, type, pick(2) != 0 ? 120 : -1)
                         : kind == 1 ? gid(g, "2001:db8:0:" + net + "::" + last, type, 64)
                                     : gid(g, "fe80::" + last, type, 64));
        }
        all[i] = nic(pick(4), std::move(gids), pick(5) == 0 ? LinkLayer::kInfiniband : LinkLayer::kEthernet);
      }
      return all;
    };
    const auto a = side(0), b = side(1);
    const Pairing ours = pair_nics(a, b), theirs = pair_nics(b, a);
    REQUIRE(ours.pairs.size() == theirs.pairs.size());
    for (const NicPair& pair : ours.pairs) {
      const auto same = std::ranges::find_if(
          theirs.pairs, [&](const NicPair& other) { return other.local == pair.remote && other.remote == pair.local; });
      REQUIRE(same != theirs.pairs.end());
      CHECK(same->local_gid.index == pair.remote_gid.index);
      CHECK(same->remote_gid.index == pair.local_gid.index);
      CHECK(same->mtu == pair.mtu);
      CHECK(same->use_grh == pair.use_grh);
    }
  }
}
