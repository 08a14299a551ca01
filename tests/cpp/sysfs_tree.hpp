// Machines that tests do not run on: writes a sysfs tree with PCI and RDMA devices into a folder of its own, as the
// kernel lays it out (links from class/ and bus/ into devices/). Owns the folder and removes it.
#pragma once

#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

namespace pdxfer::testing {

struct FakeGid {
  std::string gid, type = "RoCE v2", netdev = "";
};

struct FakePort {
  std::string state = "4: ACTIVE", physical = "5: LinkUp", rate = "400 Gb/sec (4X NDR)", layer = "Ethernet";
  std::string lid = "0x0";
  std::vector<FakeGid> gids;
  std::vector<std::string> pkeys{"0xffff"};
};

class SysfsTree {
 public:
  SysfsTree() {
    std::string pattern = (std::filesystem::temp_directory_path() / "pdxfer-sysfs-XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("mkdtemp " + pattern);
    root_ = pattern;
  }
  ~SysfsTree() {
    std::error_code error;
    std::filesystem::remove_all(root_, error);
  }
  SysfsTree(const SysfsTree&) = delete;
  SysfsTree& operator=(const SysfsTree&) = delete;

  const std::filesystem::path& root() const { return root_; }

  void file(const std::filesystem::path& path, const std::string& text) const {
    std::filesystem::create_directories((root_ / path).parent_path());
    std::ofstream(root_ / path) << text << '\n';
  }

  // `path` below devices/, such as "pci0000:15/0000:15:01.0/0000:18:00.0".
  void pci(const std::string& path, int numa_node) const {
    const std::filesystem::path device = root_ / "devices" / path;
    file(std::filesystem::path("devices") / path / "numa_node", std::to_string(numa_node));
    link(device, root_ / "bus/pci/devices" / device.filename());
  }

  // `pci_path` empty: a soft-RoCE device, which hangs on no bus.
  void rdma(const std::string& name, const std::string& pci_path, const std::vector<FakePort>& ports,
            const std::string& node_type = "1: CA") const {
    const std::string parent = pci_path.empty() ? "devices/virtual" : "devices/" + pci_path;
    const std::string folder = parent + "/infiniband/" + name;
    file(folder + "/node_type", node_type);
    file(folder + "/board_id", "MT_0000000838");
    file(folder + "/fw_ver", "28.39.1002");
    link(root_ / folder, root_ / "class/infiniband" / name);
    if (!pci_path.empty()) link(root_ / parent, root_ / folder / "device");
    for (size_t number = 1; number <= ports.size(); ++number) {
      const FakePort& port = ports[number - 1];
      const std::string at = folder + "/ports/" + std::to_string(number);
      file(at + "/state", port.state);
      file(at + "/phys_state", port.physical);
      file(at + "/rate", port.rate);
      file(at + "/link_layer", port.layer);
      file(at + "/lid", port.lid);
      for (size_t i = 0; i < port.pkeys.size(); ++i) file(at + "/pkeys/" + std::to_string(i), port.pkeys[i]);
      for (size_t i = 0; i < port.gids.size(); ++i) {
        const std::string slot = std::to_string(i);
        file(at + "/gids/" + slot, port.gids[i].gid);
        if (!port.gids[i].netdev.empty()) file(at + "/gid_attrs/ndevs/" + slot, port.gids[i].netdev);
        file(at + "/gid_attrs/types/" + slot, port.gids[i].type);
      }
    }
  }

  void netdev(const std::string& name, uint32_t mtu) const { file("class/net/" + name + "/mtu", std::to_string(mtu)); }

 private:
  static void link(const std::filesystem::path& target, const std::filesystem::path& at) {
    std::filesystem::create_directories(at.parent_path());
    if (!std::filesystem::exists(std::filesystem::symlink_status(at))) std::filesystem::create_symlink(target, at);
  }

  std::filesystem::path root_;
};

}  // namespace pdxfer::testing
