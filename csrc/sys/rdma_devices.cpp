// Reading /sys/class/infiniband; see rdma_devices.hpp.
#include "sys/rdma_devices.hpp"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/in.h>

#include <algorithm>
#include <bit>
#include <cctype>
#include <charconv>
#include <cstring>
#include <fstream>

#include "core/status.hpp"

namespace pdxfer::sys {
namespace {

namespace fs = std::filesystem;

// The first line of a file without spaces around it; "" when it cannot be read: a GID slot that is empty answers
// EINVAL.
std::string read_line(const fs::path& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  const size_t from = line.find_first_not_of(" \t"), to = line.find_last_not_of(" \t\r");
  return from == std::string::npos ? std::string{} : line.substr(from, to - from + 1);
}

uint32_t leading_number(std::string_view text, int base = 10) {
  uint32_t value = 0;
  if (base == 16 && text.starts_with("0x")) text.remove_prefix(2);
  std::from_chars(text.data(), text.data() + text.size(), value, base);
  return value;
}

std::vector<std::string> names_in(const fs::path& folder) {
  std::vector<std::string> names;
  std::error_code error;
  for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error))
    names.push_back(it->path().filename().string());
  const auto natural = [](const std::string& a, const std::string& b) {
    const auto stem = [](const std::string& s) {
      size_t at = s.size();
      while (at > 0 && std::isdigit(static_cast<unsigned char>(s[at - 1])) != 0) --at;
      return at;
    };
    const std::string_view head_a(a.data(), stem(a)), head_b(b.data(), stem(b));
    if (head_a != head_b || head_a.size() == a.size() || head_b.size() == b.size()) return a < b;
    return leading_number(std::string_view(a).substr(head_a.size())) <
           leading_number(std::string_view(b).substr(head_b.size()));
  };
  std::ranges::sort(names, natural);
  return names;
}

// "4: ACTIVE" -> "ACTIVE"
std::string after_colon(const std::string& text) {
  const size_t at = text.find(": ");
  return at == std::string::npos ? text : text.substr(at + 2);
}

// "fe80:0000:0000:0000:0e42:a1ff:fe5f:0a10"
Gid parse_gid(const std::string& text) {
  Gid gid;
  if (::inet_pton(AF_INET6, text.c_str(), gid.raw.data()) != 1) gid.raw.fill(0);
  return gid;
}

int prefix_of(const GidEntry& entry, std::span<const InterfaceAddress> addresses) {
  for (const InterfaceAddress& one : addresses)
    if (one.address == entry.gid && (entry.netdev.empty() || one.netdev == entry.netdev)) return one.prefix_bits;
  return entry.gid.is_link_local() ? 64 : -1;
}

std::vector<GidEntry> read_gids(const fs::path& port, LinkLayer layer, std::span<const InterfaceAddress> addresses) {
  std::vector<GidEntry> gids;
  for (const std::string& slot : names_in(port / "gids")) {
    GidEntry entry;
    entry.gid = parse_gid(read_line(port / "gids" / slot));
    if (entry.gid.is_zero()) continue;
    entry.index = static_cast<int>(leading_number(slot));
    // "IB/RoCE v1" on both link layers: only the layer tells which of the two it is.
    if (layer == LinkLayer::kEthernet)
      entry.type = read_line(port / "gid_attrs/types" / slot) == "RoCE v2" ? GidType::kRoceV2 : GidType::kRoceV1;
    entry.netdev = read_line(port / "gid_attrs/ndevs" / slot);
    entry.prefix_bits = prefix_of(entry, addresses);
    gids.push_back(std::move(entry));
  }
  return gids;
}

// The largest path MTU that fits the interface's, as the kernel computes it: InfiniBand headers take up to 80 bytes.
uint32_t roce_mtu(const fs::path& sysfs, const std::vector<std::string>& netdevs) {
  uint32_t mtu = 0;
  for (const std::string& netdev : netdevs)
    mtu = std::max(mtu, leading_number(read_line(sysfs / "class/net" / netdev / "mtu")));
  for (uint32_t size = 4096; size >= 256; size /= 2)
    if (mtu >= size + 80) return size;
  return 0;
}

PortInfo read_port(const fs::path& sysfs, const fs::path& device, const std::string& name,
                   std::span<const InterfaceAddress> addresses) {
  const fs::path folder = device / "ports" / name;
  PortInfo port;
  port.number = static_cast<int>(leading_number(name));
  port.state = after_colon(read_line(folder / "state"));
  port.physical_state = after_colon(read_line(folder / "phys_state"));
  port.rate = read_line(folder / "rate");
  double gbps = 0;  // "2.5 Gb/sec (1X SDR)"
  std::from_chars(port.rate.data(), port.rate.data() + port.rate.size(), gbps);
  port.rate_mbps = gbps > 0 && gbps < 1e6 ? static_cast<uint32_t>(gbps * 1000) : 0;
  const std::string layer = read_line(folder / "link_layer");
  port.layer = layer == "InfiniBand" ? LinkLayer::kInfiniband
               : layer == "Ethernet" ? LinkLayer::kEthernet
                                     : LinkLayer::kUnknown;
  port.lid = static_cast<uint16_t>(leading_number(read_line(folder / "lid"), 16));
  for (const std::string& slot : names_in(folder / "pkeys")) {
    const uint32_t index = leading_number(slot);
    if (index >= 4096) continue;
    if (port.pkeys.size() <= index) port.pkeys.resize(index + 1);
    port.pkeys[index] = static_cast<uint16_t>(leading_number(read_line(folder / "pkeys" / slot), 16));
  }
  port.gids = read_gids(folder, port.layer, addresses);
  for (const GidEntry& entry : port.gids)
    if (!entry.netdev.empty() && std::ranges::find(port.netdevs, entry.netdev) == port.netdevs.end())
      port.netdevs.push_back(entry.netdev);
  if (port.netdevs.empty()) port.netdevs = names_in(device / "device/net");
  if (port.netdevs.empty())  // soft-RoCE names its interface here
    if (const std::string parent = read_line(device / "parent"); !parent.empty()) port.netdevs.push_back(parent);
  if (port.layer == LinkLayer::kEthernet) port.active_mtu = roce_mtu(sysfs, port.netdevs);
  return port;
}

int prefix_length(const void* mask, size_t bytes) {
  int bits = 0;
  for (size_t i = 0; i < bytes; ++i) bits += std::popcount(static_cast<const uint8_t*>(mask)[i]);
  return bits;
}

}  // namespace

bool Gid::is_zero() const noexcept {
  // A default prefix with no interface id (fe80::) is what a port without an address shows.
  return std::ranges::all_of(std::span(raw).subspan(8), [](uint8_t byte) { return byte == 0; });
}

bool Gid::is_ipv4() const noexcept {
  return std::ranges::all_of(std::span(raw).first(10), [](uint8_t byte) { return byte == 0; }) && raw[10] == 0xff &&
         raw[11] == 0xff;
}

bool Gid::is_link_local() const noexcept {
  // 169.254.0.0/16 is link-local too: interfaces give it to themselves when nobody else does.
  return (raw[0] == 0xfe && (raw[1] & 0xc0) == 0x80) || (is_ipv4() && raw[12] == 169 && raw[13] == 254);
}

std::string Gid::to_string() const {
  char text[INET6_ADDRSTRLEN] = {};
  ::inet_ntop(AF_INET6, raw.data(), text, sizeof text);
  return text;
}

std::vector<DeviceInfo> list_rdma_devices(const fs::path& sysfs, std::span<const InterfaceAddress> addresses) {
  std::vector<DeviceInfo> devices;
  for (const std::string& name : names_in(sysfs / "class/infiniband")) {
    const fs::path folder = sysfs / "class/infiniband" / name;
    DeviceInfo device;
    device.name = name;
    device.node_type = after_colon(read_line(folder / "node_type"));
    device.board = read_line(folder / "board_id");
    device.firmware = read_line(folder / "fw_ver");
    device.place = pci_place(folder / "device");
    if (!device.place.path.empty()) device.pci = device.place.path.back();
    for (const std::string& port : names_in(folder / "ports"))
      device.ports.push_back(read_port(sysfs, folder, port, addresses));
    devices.push_back(std::move(device));
  }
  return devices;
}

std::vector<InterfaceAddress> list_interface_addresses() {
  ifaddrs* list = nullptr;
  if (::getifaddrs(&list) != 0)
    throw Error(Code::kUnavailable, "getifaddrs (addresses of network interfaces): " + errno_name(errno), errno);
  std::vector<InterfaceAddress> addresses;
  for (const ifaddrs* one = list; one != nullptr; one = one->ifa_next) {
    if (one->ifa_addr == nullptr || one->ifa_netmask == nullptr) continue;
    InterfaceAddress entry;
    entry.netdev = one->ifa_name;
    if (one->ifa_addr->sa_family == AF_INET) {
      entry.address.raw[10] = entry.address.raw[11] = 0xff;
      std::memcpy(&entry.address.raw[12], &reinterpret_cast<const sockaddr_in*>(one->ifa_addr)->sin_addr, 4);
      entry.prefix_bits = 96 + prefix_length(&reinterpret_cast<const sockaddr_in*>(one->ifa_netmask)->sin_addr, 4);
    } else if (one->ifa_addr->sa_family == AF_INET6) {
      std::memcpy(entry.address.raw.data(), &reinterpret_cast<const sockaddr_in6*>(one->ifa_addr)->sin6_addr, 16);
      entry.prefix_bits = prefix_length(&reinterpret_cast<const sockaddr_in6*>(one->ifa_netmask)->sin6_addr, 16);
    } else {
      continue;
    }
    addresses.push_back(std::move(entry));
  }
  ::freeifaddrs(list);
  return addresses;
}

std::vector<DeviceInfo> list_rdma_devices() { return list_rdma_devices("/sys", list_interface_addresses()); }

const char* link_layer_name(LinkLayer layer) noexcept {
  return layer == LinkLayer::kInfiniband ? "InfiniBand" : layer == LinkLayer::kEthernet ? "Ethernet" : "unknown";
}

const char* gid_type_name(GidType type) noexcept {
  return type == GidType::kRoceV2 ? "RoCE v2" : type == GidType::kRoceV1 ? "RoCE v1" : "IB";
}

}  // namespace pdxfer::sys
