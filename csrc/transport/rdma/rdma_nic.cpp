// Choice of ports, and their wire form; see rdma_nic.hpp.
#include "transport/rdma/rdma_nic.hpp"

#include <algorithm>
#include <tuple>

#include "core/codec.hpp"
#include "core/status.hpp"

namespace pdxfer::transport::rdma {
namespace {

constexpr uint8_t kVersion = 1;

std::string port_name(const sys::DeviceInfo& device, const sys::PortInfo& port) {
  return device.name + " port " + std::to_string(port.number);
}

// Does "mlx5_0" or "mlx5_0:1" name this port?
bool names_port(const std::string& name, const sys::DeviceInfo& device, const sys::PortInfo& port) {
  return name == device.name || name == device.name + ":" + std::to_string(port.number);
}

// Index of the partition in the port's table; -1: not there. The membership bit (0x8000) is the table's business.
int pkey_index(const sys::PortInfo& port, const RdmaOptions& options) {
  if (!options.pkey) return 0;
  for (size_t i = 0; i < port.pkeys.size(); ++i)
    if (port.pkeys[i] != 0 && (port.pkeys[i] & 0x7fff) == (*options.pkey & 0x7fff)) return static_cast<int>(i);
  return -1;
}

void check_names(std::span<const sys::DeviceInfo> devices, const RdmaOptions& options) {
  std::string known;
  for (const sys::DeviceInfo& device : devices) known += (known.empty() ? "" : ", ") + device.name;
  for (const std::string& name : options.devices) {
    const bool exists = std::ranges::any_of(devices, [&](const sys::DeviceInfo& device) {
      return std::ranges::any_of(device.ports,
                                 [&](const sys::PortInfo& port) { return names_port(name, device, port); });
    });
    if (!exists)
      throw Error(Code::kInvalid, "rdma option devices: there is no port \"" + name + "\" here; this machine has " +
                                      (known.empty() ? "no RDMA device (/sys/class/infiniband)" : known));
  }
}

std::string gid_trouble(const sys::PortInfo& port, const std::string& name, const RdmaOptions& options) {
  if (port.gids.empty())
    return name + ": its GID table is empty: " +
           (port.layer == sys::LinkLayer::kEthernet
                ? "give its network interface an address and bring it up (ip addr add ... dev DEV; ip link set DEV up)"
                : "no subnet manager has configured the port (opensm, or the switch's)");
  if (options.gid < 0) return "";
  std::string indexes;
  for (const sys::GidEntry& entry : port.gids) {
    if (entry.index == options.gid) return "";
    indexes += (indexes.empty() ? "" : ", ") + std::to_string(entry.index);
  }
  return name + ": no GID at index " + std::to_string(options.gid) + " (rdma option gid); its table has " + indexes;
}

Nic make_nic(const sys::DeviceInfo& device, const sys::PortInfo& port, const sys::PciPlace& near,
             const RdmaOptions& options) {
  Nic nic;
  nic.address.device = device.name;
  nic.address.port = static_cast<uint8_t>(port.number);
  nic.address.layer = port.layer;
  nic.address.lid = port.lid;
  nic.address.rate_mbps = port.rate_mbps;
  nic.address.mtu = port.active_mtu != 0 ? port.active_mtu : 1024;  // what every link carries
  if (options.mtu != 0) nic.address.mtu = std::min(nic.address.mtu, options.mtu);
  if (options.gid < 0)
    nic.address.gids = rank_gids(port.gids);
  else
    std::ranges::copy_if(port.gids, std::back_inserter(nic.address.gids),
                         [&](const sys::GidEntry& entry) { return entry.index == options.gid; });
  nic.pkey_index = static_cast<uint16_t>(pkey_index(port, options));
  nic.numa_node = device.place.numa_node;
  nic.distance = sys::pci_distance(near, device.place);
  nic.why = port.rate.empty() ? "rate unknown" : port.rate;
  if (!near.path.empty() || near.numa_node >= 0)
    nic.why = std::string(sys::pci_level_name(nic.distance.level)) + ", " + nic.why;
  return nic;
}

// Without names: ports of less than half the fastest one's rate are left alone (management, storage), then the nearest.
void keep_best(NicChoice& choice, const sys::PciPlace& near) {
  uint32_t fastest = 0;
  for (const Nic& nic : choice.nics) fastest = std::max(fastest, nic.address.rate_mbps);
  const auto drop = [&](auto&& unwanted, const std::string& why) {
    std::erase_if(choice.nics, [&](const Nic& nic) {
      if (!unwanted(nic)) return false;
      choice.refused.push_back(nic.address.name() + ": " + why + " (" + nic.why + "); name it in devices= to use it");
      return true;
    });
  };
  drop([&](const Nic& nic) { return nic.address.rate_mbps < fastest / 2; }, "less than half as fast as others here");
  if ((near.path.empty() && near.numa_node < 0) || choice.nics.empty()) return;
  const sys::PciDistance nearest = std::ranges::min(choice.nics, {}, &Nic::distance).distance;
  // Devices of one level count as equally near, except below switches, where hops tell one switch from two.
  const auto further = [&](const Nic& nic) {
    return nic.distance.level != nearest.level ||
           (nearest.level == sys::PciLevel::kSwitch && nic.distance.hops > nearest.hops);
  };
  drop(further, "further away than another");
}

}  // namespace

std::string port_trouble(const sys::DeviceInfo& device, const sys::PortInfo& port, const RdmaOptions& options) {
  const std::string name = port_name(device, port);
  if (device.node_type == "RNIC")
    return name + ": an iWARP device, which pdxfer does not drive; tcp works over its network interface";
  if (device.name.size() > kMaxDeviceName) return name + ": a name of more than 63 characters";
  if (port.number < 1 || port.number > 255) return name + ": not a port number";
  if (!port.active()) {
    const std::string netdev = port.netdevs.empty() ? "" : port.netdevs.front();
    std::string step;
    if (port.layer == sys::LinkLayer::kEthernet)
      step = "ip link set " + (netdev.empty() ? "DEV" : netdev) + " up, then check cable and switch port";
    else if (port.state == "INIT")
      step = "the link is up but no subnet manager has answered: start opensm, or the switch's";
    else
      step = "check cable and switch port (ibstat " + device.name + ")";
    return name + ": port is down (" + (port.state.empty() ? "state unknown" : port.state) +
           (port.physical_state.empty() ? "" : ", " + port.physical_state) + "): " + step;
  }
  if (port.layer == sys::LinkLayer::kUnknown) return name + ": its link layer is neither InfiniBand nor Ethernet";
  if (std::string trouble = gid_trouble(port, name, options); !trouble.empty()) return trouble;
  if (pkey_index(port, options) < 0)
    return name + ": partition " + std::to_string(*options.pkey) +
           " (rdma option pkey) is not in its table: ask the subnet manager for membership";
  return "";
}

sys::PciPlace gpu_place(std::span<const sys::Gpu> gpus, const RdmaOptions& options,
                        const std::filesystem::path& sysfs) {
  if (options.gpu < 0) return {};
  const auto gpu = std::ranges::find(gpus, options.gpu, &sys::Gpu::ordinal);
  if (gpu == gpus.end())
    throw Error(Code::kUnavailable, "rdma option gpu=" + std::to_string(options.gpu) + ": the CUDA driver lists " +
                                        (gpus.empty() ? "no GPU" : std::to_string(gpus.size()) + " GPU(s)") +
                                        " to this process; run `pdxfer doctor`");
  return sys::pci_place(sysfs / "bus/pci/devices" / gpu->pci);
}

NicChoice choose_nics(std::span<const sys::DeviceInfo> devices, const sys::PciPlace& near, const RdmaOptions& options) {
  check_names(devices, options);
  NicChoice choice;
  uint16_t rails[3] = {};
  for (const sys::DeviceInfo& device : devices)
    for (const sys::PortInfo& port : device.ports) {
      const uint16_t rail = rails[static_cast<size_t>(port.layer)]++;
      const bool named =
          std::ranges::any_of(options.devices, [&](const std::string& name) { return names_port(name, device, port); });
      if (!options.devices.empty() && !named) {
        choice.refused.push_back(port_name(device, port) + ": not in the rdma option devices");
      } else if (std::string trouble = port_trouble(device, port, options); !trouble.empty()) {
        choice.refused.push_back(std::move(trouble));
      } else {
        choice.nics.push_back(make_nic(device, port, near, options));
        choice.nics.back().address.rail = rail;
      }
    }
  if (options.devices.empty()) keep_best(choice, near);
  std::ranges::stable_sort(choice.nics, {}, [](const Nic& nic) { return std::tuple(nic.distance, nic.address.rail); });
  while (choice.nics.size() > kMaxNics) {
    choice.refused.push_back(choice.nics.back().address.name() + ": one engine uses at most 16 ports");
    choice.nics.pop_back();
  }
  return choice;
}

std::string describe_refusals(const NicChoice& choice) {
  if (choice.refused.empty()) return "this machine has no RDMA device (/sys/class/infiniband is empty or absent)";
  std::string text;
  for (const std::string& one : choice.refused) text += (text.empty() ? "" : "; ") + one;
  return text;
}

std::vector<sys::GidEntry> rank_gids(std::span<const sys::GidEntry> gids) {
  std::vector<sys::GidEntry> ranked(gids.begin(), gids.end());
  std::ranges::stable_sort(ranked, {}, [](const sys::GidEntry& entry) {
    return std::tuple(entry.type == sys::GidType::kRoceV1, entry.gid.is_link_local(), !entry.gid.is_ipv4(),
                      entry.index);
  });
  if (ranked.size() > kMaxGids) ranked.resize(kMaxGids);
  return ranked;
}

Bytes encode_nics(std::span<const Nic> nics) {
  Writer out;
  out.integer(kVersion).integer(static_cast<uint8_t>(nics.size()));
  for (const Nic& nic : nics) {
    const NicAddress& one = nic.address;
    out.text(one.device).integer(one.port).integer(static_cast<uint8_t>(one.layer)).integer(one.lid).integer(one.rail);
    out.integer(one.mtu).integer(one.rate_mbps).integer(static_cast<uint8_t>(one.gids.size()));
    for (const sys::GidEntry& entry : one.gids) {
      out.raw(std::as_bytes(std::span(entry.gid.raw))).integer(static_cast<uint16_t>(entry.index));
      out.integer(static_cast<uint8_t>(entry.type)).integer(static_cast<int16_t>(entry.prefix_bits));
    }
  }
  return out.take();
}

std::vector<NicAddress> decode_nics(ByteView data) {
  const auto reject = [](const char* what) { throw Error(Code::kInvalid, std::string("rdma address: ") + what); };
  Reader in(data);
  if (in.integer<uint8_t>() != kVersion) reject("another version of pdxfer wrote it; install the same on both ends");
  const size_t count = in.integer<uint8_t>();
  if (count > kMaxNics) reject("more ports than an engine has");
  std::vector<NicAddress> nics(count);
  for (NicAddress& one : nics) {
    one.device = in.text();
    one.port = in.integer<uint8_t>();
    const auto layer = in.integer<uint8_t>();
    one.lid = in.integer<uint16_t>();
    one.rail = in.integer<uint16_t>();
    one.mtu = in.integer<uint32_t>();
    one.rate_mbps = in.integer<uint32_t>();
    const size_t gids = in.integer<uint8_t>();
    const bool printable = std::ranges::all_of(one.device, [](char c) { return c > ' ' && c < 127; });
    if (!in.ok() || one.device.empty() || one.device.size() > kMaxDeviceName || !printable || one.port == 0 ||
        layer < 1 || layer > 2 || one.mtu < 256 || one.mtu > 4096 || gids > kMaxGids)
      reject("a field out of range");
    one.layer = static_cast<sys::LinkLayer>(layer);
    one.gids.resize(gids);
    for (sys::GidEntry& entry : one.gids) {
      const ByteView raw = in.raw(16);
      if (raw.size() == 16) std::memcpy(entry.gid.raw.data(), raw.data(), 16);
      entry.index = in.integer<uint16_t>();
      const auto type = in.integer<uint8_t>();
      entry.prefix_bits = in.integer<int16_t>();
      if (!in.ok() || type > 2 || entry.prefix_bits < -1 || entry.prefix_bits > 128) reject("a GID out of range");
      entry.type = static_cast<sys::GidType>(type);
    }
  }
  if (!in.done()) reject("too short or too long");
  return nics;
}

}  // namespace pdxfer::transport::rdma
