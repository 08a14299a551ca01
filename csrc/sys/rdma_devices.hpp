// RDMA devices as the kernel shows them below /sys/class/infiniband: ports, state, rate, GID tables, network interfaces
// (what ibdev2netdev prints), place in the PCIe tree. Needs no libibverbs. Called at set-up and by doctor, on the
// caller's thread; owns nothing. The root is a parameter so that tests describe machines that they do not have.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "sys/pci.hpp"

namespace pdxfer::sys {

enum class LinkLayer : uint8_t { kUnknown, kInfiniband, kEthernet };
enum class GidType : uint8_t { kInfiniband, kRoceV1, kRoceV2 };

struct Gid {
  std::array<uint8_t, 16> raw{};
  bool is_zero() const noexcept;
  bool is_ipv4() const noexcept;        // ::ffff:a.b.c.d
  bool is_link_local() const noexcept;  // fe80::/10
  std::string to_string() const;        // "::ffff:10.0.0.1", "fe80::1"
  friend bool operator==(const Gid&, const Gid&) = default;
};

struct GidEntry {
  int index = 0;
  Gid gid;
  GidType type = GidType::kInfiniband;
  std::string netdev;    // "eth0.100"; empty on InfiniBand
  int prefix_bits = -1;  // of 128, of the interface's address; -1: not known
};

struct PortInfo {
  int number = 1;
  std::string state, physical_state;  // "ACTIVE", "LinkUp", as sysfs says them
  LinkLayer layer = LinkLayer::kUnknown;
  uint32_t rate_mbps = 0;
  std::string rate;  // "400 Gb/sec (4X NDR)"
  uint16_t lid = 0;
  uint32_t active_mtu = 0;  // bytes; 0: sysfs does not say (InfiniBand: ask ibv_query_port)
  std::vector<GidEntry> gids;
  std::vector<uint16_t> pkeys;       // by index; 0: an empty slot
  std::vector<std::string> netdevs;  // as the GID table names them, else those below the device
  bool active() const noexcept { return state == "ACTIVE"; }
};

struct DeviceInfo {
  std::string name;       // "mlx5_0"
  std::string node_type;  // "CA", "RNIC" (iWARP)
  std::string board, firmware;
  std::string pci;  // "0000:18:00.0"; empty for soft-RoCE
  PciPlace place;
  std::vector<PortInfo> ports;
};

// An address of a network interface, IPv4 in its mapped form (prefix 96 + length).
struct InterfaceAddress {
  std::string netdev;
  Gid address;
  int prefix_bits = 128;
};

// In natural order of names (mlx5_2 before mlx5_10), which numbers the rails. Files that are missing leave defaults.
std::vector<DeviceInfo> list_rdma_devices(const std::filesystem::path& sysfs,
                                          std::span<const InterfaceAddress> addresses);
// This process's view of its network interfaces. Throws Error(kUnavailable) when the kernel refuses the list.
std::vector<InterfaceAddress> list_interface_addresses();

// Both together, for this machine.
std::vector<DeviceInfo> list_rdma_devices();

const char* link_layer_name(LinkLayer layer) noexcept;  // "InfiniBand", "Ethernet", "unknown"
const char* gid_type_name(GidType type) noexcept;       // "IB", "RoCE v1", "RoCE v2"

}  // namespace pdxfer::sys
