// Reading PCI places from sysfs and comparing them; see pci.hpp.
#include "sys/pci.hpp"

#include <algorithm>
#include <charconv>
#include <fstream>

namespace pdxfer::sys {
namespace {

// "0000:18:00.0"
bool is_function(std::string_view name) {
  return name.size() >= 12 && name[name.size() - 2] == '.' && name[name.size() - 5] == ':' &&
         name[name.size() - 8] == ':';
}

}  // namespace

PciPlace pci_place(const std::filesystem::path& link) {
  PciPlace place;
  std::error_code error;
  const std::filesystem::path real = std::filesystem::canonical(link, error);
  if (error) return place;
  for (const std::filesystem::path& part : real) {
    const std::string name = part.string();
    if (name.starts_with("pci") && name.find(':') != std::string::npos) place.path.assign(1, name);
    if (!place.path.empty() && is_function(name)) place.path.push_back(name);
  }
  if (place.path.size() == 1) place.path.clear();  // a bridge without a device below it
  std::ifstream file(real / "numa_node");
  if (!(file >> place.numa_node)) place.numa_node = -1;
  return place;
}

PciDistance pci_distance(const PciPlace& a, const PciPlace& b) {
  const bool both_pci = !a.path.empty() && !b.path.empty();
  if (both_pci) {
    const auto split = std::ranges::mismatch(a.path, b.path);
    const auto common = static_cast<int>(split.in1 - a.path.begin());
    const int hops = static_cast<int>(a.path.size() + b.path.size()) - 2 * common;
    // Functions of one card (0000:18:00.0 and .1) share everything but the function number.
    const std::string &last_a = a.path.back(), &last_b = b.path.back();
    if (hops == 0 || (hops == 2 && last_a.substr(0, last_a.size() - 1) == last_b.substr(0, last_b.size() - 1)))
      return {PciLevel::kSameDevice, hops};
    if (common >= 2) return {PciLevel::kSwitch, hops};  // a root port or a switch in common
    if (common == 1) return {PciLevel::kHostBridge, hops};
  }
  if (a.numa_node < 0 || b.numa_node < 0) return {PciLevel::kUnknown, 0};
  return {a.numa_node == b.numa_node ? PciLevel::kNumaNode : PciLevel::kSystem, 0};
}

const char* pci_level_name(PciLevel level) noexcept {
  switch (level) {
    case PciLevel::kSameDevice:
      return "same device";
    case PciLevel::kSwitch:
      return "same PCIe switch";
    case PciLevel::kHostBridge:
      return "same PCIe host bridge";
    case PciLevel::kNumaNode:
      return "same NUMA node";
    case PciLevel::kSystem:
      return "other NUMA node";
    case PciLevel::kUnknown:
      break;
  }
  return "distance unknown";
}

}  // namespace pdxfer::sys
