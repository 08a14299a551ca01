// Where a PCI device hangs in the machine, from sysfs, and how far two of them are from each other. Pure but for
// reading links below a root that tests replace. Any thread; owns nothing.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace pdxfer::sys {

struct PciPlace {
  // From the host bridge down to the device: {"pci0000:15", "0000:15:01.0", ..., "0000:18:00.0"}; empty: not PCI.
  std::vector<std::string> path;
  int numa_node = -1;  // -1: the firmware did not say
};

// The ways from one device to another, nearest first; as `nvidia-smi topo -m` groups them (PIX/PXB, PHB, NODE, SYS).
enum class PciLevel : int { kSameDevice, kSwitch, kHostBridge, kNumaNode, kSystem, kUnknown };

struct PciDistance {
  PciLevel level = PciLevel::kUnknown;
  int hops = 0;  // links between the two along the tree; orders devices of one level
  friend auto operator<=>(const PciDistance&, const PciDistance&) = default;
};

// `link` is a sysfs link to a device, such as SYSFS/bus/pci/devices/0000:18:00.0. Nothing there: an empty place.
PciPlace pci_place(const std::filesystem::path& link);
PciDistance pci_distance(const PciPlace& a, const PciPlace& b);
// "same PCIe switch", "same NUMA node", ...: for doctor and explain.
const char* pci_level_name(PciLevel level) noexcept;

}  // namespace pdxfer::sys
