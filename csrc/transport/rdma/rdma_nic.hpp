// Which of this machine's RDMA ports to use, and what a peer is told of each. Functions on plain structs (and on
// links below a sysfs root that tests replace), called at set-up on any thread and by doctor; own nothing. Pairing with
// the peer's ports: rdma_gid.hpp.
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "core/rdma_options.hpp"
#include "core/types.hpp"
#include "sys/rdma_devices.hpp"
#include "sys/topology.hpp"

namespace pdxfer::transport::rdma {

inline constexpr size_t kMaxNics = 16;        // of one engine; with kMaxGids each, addresses stay below 4 KiB
inline constexpr size_t kMaxGids = 8;         // told to a peer per port, the most useful first
inline constexpr size_t kMaxDeviceName = 63;  // IBV_SYSFS_NAME_MAX - 1

// A port as the other end sees it.
struct NicAddress {
  std::string device;
  uint8_t port = 1;
  sys::LinkLayer layer = sys::LinkLayer::kUnknown;
  uint16_t lid = 0;
  uint16_t rail = 0;  // number among the machine's ports of this link layer, dead ones counted, so that hosts agree
  uint32_t mtu = 0;   // bytes, already bounded by our option
  uint32_t rate_mbps = 0;
  std::vector<sys::GidEntry> gids;  // netdev is not told
  std::string name() const { return device + " port " + std::to_string(port); }
};

struct Nic {
  NicAddress address;
  sys::PciDistance distance;  // from what the memory belongs to
  uint16_t pkey_index = 0;
  int numa_node = -1;
  std::string why;  // "same PCIe switch, 400 Gb/sec (4X NDR)"
};

struct NicChoice {
  std::vector<Nic> nics;             // nearest first, then by rail
  std::vector<std::string> refused;  // ports not taken, each with its reason and the next step
};

// Why this port cannot be used; empty: it can. Names the port, the state and what to do.
std::string port_trouble(const sys::DeviceInfo& device, const sys::PortInfo& port, const RdmaOptions& options);

// Where the GPU of the option `gpu` hangs; an empty place without the option, or when `sysfs` does not show the GPU.
// `gpus`: what the CUDA driver lists. Throws Error(kUnavailable) when the option names none of them.
sys::PciPlace gpu_place(std::span<const sys::Gpu> gpus, const RdmaOptions& options, const std::filesystem::path& sysfs);

// `near`: the GPU's or the memory's place; an empty one: every usable port of sufficient rate. Named devices
// (options.devices) are taken however far they are. Throws Error(kInvalid) when a named device does not exist.
NicChoice choose_nics(std::span<const sys::DeviceInfo> devices, const sys::PciPlace& near, const RdmaOptions& options);

// One text for the Error when nothing was chosen: every port's reason.
std::string describe_refusals(const NicChoice& choice);

// GIDs that may be told to a peer: kMaxGids, RoCE v2 before v1, routable before link-local, IPv4 before IPv6.
std::vector<sys::GidEntry> rank_gids(std::span<const sys::GidEntry> gids);

// The wire form of a list of ports. decode throws Error(kInvalid) for anything that encode would not have written.
Bytes encode_nics(std::span<const Nic> nics);
std::vector<NicAddress> decode_nics(ByteView data);

}  // namespace pdxfer::transport::rdma
