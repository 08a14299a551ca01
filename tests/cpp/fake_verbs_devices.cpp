// The machine of fake_verbs.hpp as sysfs would show it.
#include "fake_verbs.hpp"

namespace fake {

std::vector<pdxfer::sys::DeviceInfo> devices(int count) {
  using namespace pdxfer::sys;
  std::vector<DeviceInfo> all;
  for (int i = 0; i < count; ++i) {
    DeviceInfo device;
    device.name = "fake" + std::to_string(i);
    device.node_type = "CA";
    PortInfo port;
    port.state = "ACTIVE";
    port.physical_state = "LinkUp";
    port.layer = LinkLayer::kEthernet;
    port.rate_mbps = 100000;
    port.rate = "100 Gb/sec";
    port.active_mtu = 4096;
    port.pkeys = {0xffff};
    GidEntry gid;
    gid.index = 3;
    gid.type = GidType::kRoceV2;
    gid.prefix_bits = 96 + 24;
    gid.gid.raw[10] = gid.gid.raw[11] = 0xff;
    gid.gid.raw[12] = 10;
    gid.gid.raw[15] = static_cast<uint8_t>(i + 1);
    port.gids.push_back(gid);
    device.ports.push_back(port);
    all.push_back(device);
  }
  return all;
}

}  // namespace fake
