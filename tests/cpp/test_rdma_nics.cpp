// Reading RDMA devices from sysfs and choosing among them, on trees that describe machines with eight NICs, VLANs,
// bonds, dead ports, InfiniBand, iWARP and soft-RoCE.
#include <arpa/inet.h>
#include <doctest/doctest.h>

#include <string>

#include "core/status.hpp"
#include "sys/rdma_devices.hpp"
#include "sysfs_tree.hpp"
#include "transport/rdma/rdma_nic.hpp"

using namespace pdxfer;
using namespace pdxfer::testing;
using sys::DeviceInfo;
using transport::rdma::choose_nics;
using transport::rdma::gpu_place;
using transport::rdma::NicChoice;

namespace {

bool has(const std::string& text, std::string_view part) { return text.find(part) != std::string::npos; }

std::string v4(int third, int last) {
  char text[64];
  std::snprintf(text, sizeof text, "0000:0000:0000:0000:0000:ffff:0a00:%02x%02x", third, last);
  return text;
}

// What a RoCE port shows: its link-local and its IPv4 address, each as v1 and v2.
FakePort roce(int rail, const std::string& netdev) {
  FakePort port;
  const std::string local = "fe80:0000:0000:0000:0e42:a1ff:fe5f:0a0" + std::to_string(rail);
  port.gids = {{local, "IB/RoCE v1", netdev},
               {local, "RoCE v2", netdev},
               {v4(rail, 1), "IB/RoCE v1", netdev},
               {v4(rail, 1), "RoCE v2", netdev}};
  return port;
}

std::string gpu_path(int i) {
  const std::string bus = std::to_string(i + 1);
  return "pci0000:" + bus + "0/0000:" + bus + "0:01.0/0000:" + bus + "1:00.0/0000:" + bus + "2:00.0/0000:" + bus +
         "3:00.0";
}
std::string nic_path(int i) {
  const std::string bus = std::to_string(i + 1);
  return "pci0000:" + bus + "0/0000:" + bus + "0:01.0/0000:" + bus + "1:00.0/0000:" + bus + "2:01.0/0000:" + bus +
         "4:00.0";
}

// Eight switches, a GPU and a NIC below each, two NUMA nodes; two slower devices for storage.
void eight_nics(const SysfsTree& tree) {
  for (int i = 0; i < 8; ++i) {
    tree.pci(gpu_path(i), i / 4);
    tree.pci(nic_path(i), i / 4);
    tree.netdev("eth" + std::to_string(i), 9000);
    tree.rdma("mlx5_" + std::to_string(i), nic_path(i), {roce(i, "eth" + std::to_string(i))});
  }
  for (int i = 0; i < 2; ++i) {
    const std::string path = "pci0000:a" + std::to_string(i) + "/0000:a" + std::to_string(i) + ":00.0";
    tree.pci(path, i);
    FakePort slow = roce(8 + i, "eth" + std::to_string(10 + i));
    slow.rate = "100 Gb/sec (4X EDR)";
    tree.rdma("mlx5_" + std::to_string(10 + i), path, {slow});
  }
}

sys::InterfaceAddress address(const std::string& netdev, const char* text, int bits) {
  sys::InterfaceAddress one{netdev, {}, bits};
  REQUIRE(::inet_pton(AF_INET6, text, one.address.raw.data()) == 1);
  return one;
}

sys::PciPlace gpu(const SysfsTree& tree, int i) {
  const std::string path = gpu_path(i);
  return sys::pci_place(tree.root() / "bus/pci/devices" / path.substr(path.rfind('/') + 1));
}

std::string names(const NicChoice& choice) {
  std::string text;
  for (const auto& nic : choice.nics) text += (text.empty() ? "" : " ") + nic.address.device;
  return text;
}

}  // namespace

TEST_CASE("a RoCE port as sysfs shows it") {
  SysfsTree tree;
  eight_nics(tree);
  const std::vector addresses{address("eth3", "::ffff:10.0.3.1", 120)};
  const std::vector<DeviceInfo> devices = sys::list_rdma_devices(tree.root(), addresses);
  REQUIRE(devices.size() == 10);
  CHECK(devices[2].name == "mlx5_2");
  CHECK(devices[8].name == "mlx5_10");  // after mlx5_7: numbers, not letters, order them
  const DeviceInfo& device = devices[3];
  CHECK(device.pci == "0000:44:00.0");
  CHECK(device.place.numa_node == 0);
  CHECK(device.place.path.size() == 5);
  CHECK(device.board == "MT_0000000838");
  REQUIRE(device.ports.size() == 1);
  const sys::PortInfo& port = device.ports[0];
  CHECK(port.active());
  CHECK(port.physical_state == "LinkUp");
  CHECK(port.rate_mbps == 400000);
  CHECK(port.layer == sys::LinkLayer::kEthernet);
  CHECK(port.active_mtu == 4096);
  CHECK(port.netdevs == std::vector<std::string>{"eth3"});
  REQUIRE(port.gids.size() == 4);
  CHECK(port.gids[0].type == sys::GidType::kRoceV1);
  CHECK(port.gids[1].type == sys::GidType::kRoceV2);
  CHECK(port.gids[1].gid.is_link_local());
  CHECK(port.gids[1].prefix_bits == 64);
  CHECK(port.gids[3].index == 3);
  CHECK(port.gids[3].gid.is_ipv4());
  CHECK(port.gids[3].gid.to_string() == "::ffff:10.0.3.1");
  CHECK(port.gids[3].prefix_bits == 120);
  CHECK(devices[4].ports[0].gids[3].prefix_bits == -1);
}

TEST_CASE("InfiniBand: lid, partitions, and empty GID slots left out") {
  SysfsTree tree;
  FakePort port;
  port.layer = "InfiniBand";
  port.lid = "0x1a3";
  port.gids = {{"fe80:0000:0000:0000:0002:c903:00a1:b2c1", "IB/RoCE v1", ""},
               {"0000:0000:0000:0000:0000:0000:0000:0000", "", ""},
               {"fe80:0000:0000:0000:0000:0000:0000:0000", "", ""}};
  port.pkeys = {"0xffff", "0x8005", "0x0000"};
  tree.pci("pci0000:00/0000:00:02.0/0000:03:00.0", 0);
  tree.rdma("ibp3s0", "pci0000:00/0000:00:02.0/0000:03:00.0", {port});
  const auto devices = sys::list_rdma_devices(tree.root(), {});
  REQUIRE(devices.size() == 1);
  const sys::PortInfo& got = devices[0].ports.at(0);
  CHECK(got.lid == 0x1a3);
  CHECK(got.gids.size() == 1);
  CHECK(got.gids[0].type == sys::GidType::kInfiniband);
  CHECK(got.active_mtu == 0);
  CHECK(got.pkeys == std::vector<uint16_t>{0xffff, 0x8005, 0});

  CHECK(choose_nics(devices, {}, RdmaOptions::parse("pkey=0x0005")).nics.at(0).pkey_index == 1);
  const NicChoice none = choose_nics(devices, {}, RdmaOptions::parse("pkey=0x8006"));
  CHECK(none.nics.empty());
  CHECK(has(transport::rdma::describe_refusals(none), "partition 32774 (rdma option pkey) is not in its table"));
}

TEST_CASE("eight GPUs, eight NICs: each GPU has its own") {
  SysfsTree tree;
  eight_nics(tree);
  const auto devices = sys::list_rdma_devices(tree.root(), {});
  for (int i = 0; i < 8; ++i) {
    const NicChoice choice = choose_nics(devices, gpu(tree, i), {});
    CHECK(names(choice) == "mlx5_" + std::to_string(i));
    CHECK(choice.nics.at(0).address.rail == i);
    CHECK(choice.nics.at(0).distance.level == sys::PciLevel::kSwitch);
    CHECK(has(choice.nics.at(0).why, "same PCIe switch, 400 Gb/sec"));
    CHECK(choice.refused.size() == 9);
  }
  // Host memory: all fast ones; the storage devices only when named.
  CHECK(names(choose_nics(devices, {}, {})) == "mlx5_0 mlx5_1 mlx5_2 mlx5_3 mlx5_4 mlx5_5 mlx5_6 mlx5_7");
  sys::PciPlace node1;
  node1.numa_node = 1;
  CHECK(names(choose_nics(devices, node1, {})) == "mlx5_4 mlx5_5 mlx5_6 mlx5_7");
  CHECK(names(choose_nics(devices, {}, RdmaOptions::parse("devices=mlx5_11;mlx5_1:1"))) == "mlx5_1 mlx5_11");
}

// What a CUDA driver that orders GPUs in its own way lists: ordinal 0 is the machine's last GPU.
std::vector<sys::Gpu> gpus_from_last_to_first() {
  std::vector<sys::Gpu> gpus(8);
  for (int ordinal = 0; ordinal < 8; ++ordinal) {
    const std::string path = gpu_path(7 - ordinal);
    gpus[static_cast<size_t>(ordinal)].ordinal = ordinal;
    gpus[static_cast<size_t>(ordinal)].pci = path.substr(path.rfind('/') + 1);
  }
  return gpus;
}

TEST_CASE("the option gpu: the driver's ordinal, found by its PCI address, decides which ports are near") {
  SysfsTree tree;
  eight_nics(tree);
  const auto devices = sys::list_rdma_devices(tree.root(), {});
  std::vector<sys::Gpu> gpus = gpus_from_last_to_first();
  const auto chosen = [&](const RdmaOptions& options) {
    return choose_nics(devices, gpu_place(gpus, options, tree.root()), options);
  };
  for (int ordinal = 0; ordinal < 8; ++ordinal) {
    CAPTURE(ordinal);
    const NicChoice choice = chosen(RdmaOptions::parse("gpu=" + std::to_string(ordinal)));
    CHECK(names(choice) == "mlx5_" + std::to_string(7 - ordinal));
    CHECK(choice.nics.at(0).address.rail == 7 - ordinal);
    CHECK(choice.nics.at(0).distance == sys::PciDistance{sys::PciLevel::kSwitch, 4});
    CHECK(choice.nics.at(0).numa_node == (7 - ordinal) / 4);
  }
  // Without the option nothing is near; named ports are taken however far, the near one first.
  CHECK(gpu_place(gpus, {}, tree.root()).path.empty());
  CHECK(names(chosen({})) == "mlx5_0 mlx5_1 mlx5_2 mlx5_3 mlx5_4 mlx5_5 mlx5_6 mlx5_7");
  const NicChoice named = chosen(RdmaOptions::parse("gpu=1,devices=mlx5_0;mlx5_5;mlx5_6"));  // GPU 6 of the machine
  CHECK(names(named) == "mlx5_6 mlx5_5 mlx5_0");
  REQUIRE(named.nics.size() == 3);
  CHECK(named.nics[1].distance.level == sys::PciLevel::kNumaNode);
  CHECK(named.nics[2].distance.level == sys::PciLevel::kSystem);
  CHECK(named.nics[2].address.rail == 0);
}

TEST_CASE("the option gpu: a GPU without a NIC of its own takes its host bridge's, its NUMA node's, or any") {
  SysfsTree tree;
  eight_nics(tree);
  const auto devices = sys::list_rdma_devices(tree.root(), {});
  const auto near = [&](const std::string& path, int numa_node) {
    if (!path.empty()) tree.pci(path, numa_node);
    sys::Gpu gpu;
    gpu.pci =
        path.empty() ? "0000:ff:00.0" : path.substr(path.rfind('/') + 1);  // not in the tree: hidden by a container
    const RdmaOptions options = RdmaOptions::parse("gpu=0");
    return names(choose_nics(devices, gpu_place({&gpu, 1}, options, tree.root()), options));
  };
  CHECK(near("pci0000:30/0000:30:02.0/0000:38:00.0", 0) == "mlx5_2");
  CHECK(near("pci0000:b0/0000:b0:01.0/0000:b1:00.0", 1) == "mlx5_4 mlx5_5 mlx5_6 mlx5_7");
  CHECK(near("pci0000:b0/0000:b0:02.0/0000:b2:00.0", -1) == "mlx5_0 mlx5_1 mlx5_2 mlx5_3 mlx5_4 mlx5_5 mlx5_6 mlx5_7");
  CHECK(near("", 0) == "mlx5_0 mlx5_1 mlx5_2 mlx5_3 mlx5_4 mlx5_5 mlx5_6 mlx5_7");
}

TEST_CASE("the option gpu: one that the driver does not list is an error that says what it lists") {
  SysfsTree tree;
  const std::vector<sys::Gpu> gpus = gpus_from_last_to_first();
  const RdmaOptions options = RdmaOptions::parse("gpu=8");
  CHECK_THROWS_WITH_AS(gpu_place(gpus, options, tree.root()),
                       "rdma option gpu=8: the CUDA driver lists 8 GPU(s) to this process; run `pdxfer doctor`", Error);
  CHECK_THROWS_WITH_AS(gpu_place({}, options, tree.root()),
                       "rdma option gpu=8: the CUDA driver lists no GPU to this process; run `pdxfer doctor`", Error);
}

TEST_CASE("the NIC next to the GPU is dead: the next ones are taken, and why is said") {
  SysfsTree tree;
  eight_nics(tree);
  tree.file("devices/" + nic_path(2) + "/infiniband/mlx5_2/ports/1/state", "1: DOWN");
  tree.file("devices/" + nic_path(2) + "/infiniband/mlx5_2/ports/1/phys_state", "3: Disabled");
  const auto devices = sys::list_rdma_devices(tree.root(), {});
  const NicChoice choice = choose_nics(devices, gpu(tree, 2), {});
  CHECK(names(choice) == "mlx5_0 mlx5_1 mlx5_3");  // the same NUMA node
  CHECK(choice.nics.at(2).address.rail == 3);      // a dead port does not shift rails
  CHECK(has(transport::rdma::describe_refusals(choice),
            "mlx5_2 port 1: port is down (DOWN, Disabled): ip link set eth2 up"));
}

TEST_CASE("ports that cannot serve say so") {
  SysfsTree tree;
  FakePort no_gid, init, iwarp = roce(1, "eth1");
  init.state = "2: INIT";
  init.layer = "InfiniBand";
  tree.rdma("a0", "", {no_gid});
  tree.rdma("b0", "", {init});
  tree.rdma("c0", "", {iwarp}, "4: RNIC");
  tree.rdma("d0", "", {roce(3, "eth3")});
  const auto devices = sys::list_rdma_devices(tree.root(), {});
  const NicChoice choice = choose_nics(devices, {}, RdmaOptions::parse("gid=9"));
  CHECK(choice.nics.empty());
  const std::string text = transport::rdma::describe_refusals(choice);
  CHECK(has(text, "a0 port 1: its GID table is empty: give its network interface an address"));
  CHECK(has(text, "b0 port 1: port is down (INIT, LinkUp): the link is up but no subnet manager has answered"));
  CHECK(has(text, "c0 port 1: an iWARP device"));
  CHECK(has(text, "d0 port 1: no GID at index 9 (rdma option gid); its table has 0, 1, 2, 3"));
  CHECK(has(transport::rdma::describe_refusals({}), "no RDMA device"));
  CHECK_THROWS_WITH_AS(choose_nics(devices, {}, RdmaOptions::parse("devices=mlx5_0")),
                       "rdma option devices: there is no port \"mlx5_0\" here; this machine has a0, b0, c0, d0", Error);
}

TEST_CASE("VLAN and bond: GIDs carry their interface, both ports of a card are one device away") {
  SysfsTree tree;
  FakePort port = roce(1, "bond0");
  port.gids.push_back({v4(100, 1), "RoCE v2", "bond0.100"});
  FakePort down;
  down.state = "1: DOWN";
  down.gids = {};
  tree.netdev("bond0", 1500);
  tree.netdev("bond0.100", 1500);
  tree.pci("pci0000:10/0000:10:01.0/0000:11:00.0", 0);
  tree.pci("pci0000:10/0000:10:01.0/0000:11:00.1", 0);
  tree.rdma("mlx5_bond_0", "pci0000:10/0000:10:01.0/0000:11:00.0", {port, down});
  const auto devices = sys::list_rdma_devices(tree.root(), {});
  CHECK(devices[0].ports[0].netdevs == std::vector<std::string>{"bond0", "bond0.100"});
  CHECK(devices[0].ports[0].active_mtu == 1024);
  const auto place = sys::pci_place(tree.root() / "bus/pci/devices/0000:11:00.1");
  CHECK(sys::pci_distance(place, devices[0].place).level == sys::PciLevel::kSameDevice);
  const NicChoice choice = choose_nics(devices, place, RdmaOptions::parse("mtu=512"));
  REQUIRE(choice.nics.size() == 1);
  CHECK(choice.nics[0].address.mtu == 512);
  REQUIRE(choice.nics[0].address.gids.size() == 5);
  CHECK(choice.nics[0].address.gids[0].index == 3);  // RoCE v2, routable, IPv4, low index
  CHECK(choice.nics[0].address.gids[1].index == 4);
  CHECK(choice.nics[0].address.gids[2].index == 1);
}

TEST_CASE("distances") {
  SysfsTree tree;
  eight_nics(tree);
  tree.pci("pci0000:10/0000:10:03.0/0000:1a:00.0", 0);
  const auto at = [&](const std::string& path) {
    return sys::pci_place(tree.root() / "bus/pci/devices" / path.substr(path.rfind('/') + 1));
  };
  const sys::PciPlace here = gpu(tree, 0);
  CHECK(sys::pci_distance(here, here).level == sys::PciLevel::kSameDevice);
  CHECK(sys::pci_distance(here, at(nic_path(0))).level == sys::PciLevel::kSwitch);
  CHECK(sys::pci_distance(here, at(nic_path(0))).hops == 4);
  CHECK(sys::pci_distance(here, at("pci0000:10/0000:10:03.0/0000:1a:00.0")).level == sys::PciLevel::kHostBridge);
  CHECK(sys::pci_distance(here, at(nic_path(1))).level == sys::PciLevel::kNumaNode);
  CHECK(sys::pci_distance(here, at(nic_path(7))).level == sys::PciLevel::kSystem);
  CHECK(sys::pci_distance(here, {}).level == sys::PciLevel::kUnknown);
  CHECK(sys::pci_place(tree.root() / "bus/pci/devices/none").path.empty());
}

TEST_CASE("what a peer is told survives the wire; what it may not say is refused") {
  SysfsTree tree;
  eight_nics(tree);
  const auto devices = sys::list_rdma_devices(tree.root(), {});
  const NicChoice choice = choose_nics(devices, {}, {});
  const Bytes wire = transport::rdma::encode_nics(choice.nics);
  CHECK(wire.size() <= 4096);
  const auto told = transport::rdma::decode_nics(wire);
  REQUIRE(told.size() == 8);
  CHECK(told[5].device == "mlx5_5");
  CHECK(told[5].rail == 5);
  CHECK(told[5].mtu == 4096);
  CHECK(told[5].gids.at(0).gid == choice.nics[5].address.gids[0].gid);
  CHECK(told[5].gids.at(0).prefix_bits == -1);
  for (size_t cut = 0; cut < wire.size(); ++cut)
    CHECK_THROWS_AS(transport::rdma::decode_nics(ByteView(wire).first(cut)), Error);
  for (size_t at = 0; at < wire.size(); ++at)
    for (int value : {0, 0x7f, 0xff}) {  // any byte: an error or other values, never a crash
      Bytes other = wire;
      other[at] = static_cast<std::byte>(value);
      try {
        const size_t count = transport::rdma::decode_nics(other).size();
        CHECK(count <= transport::rdma::kMaxNics);
      } catch (const Error& error) {
        CHECK(error.code() == Code::kInvalid);
      }
    }
  // The longest that can be told still fits an address.
  std::vector<transport::rdma::Nic> most(transport::rdma::kMaxNics, choice.nics[0]);
  for (auto& nic : most) {
    nic.address.device.assign(transport::rdma::kMaxDeviceName, 'x');
    nic.address.gids.resize(transport::rdma::kMaxGids);
  }
  CHECK(transport::rdma::encode_nics(most).size() <= 4096);
}

TEST_CASE("this machine can be asked") {
  for (const DeviceInfo& device : sys::list_rdma_devices()) CHECK_FALSE(device.name.empty());
  bool loopback = false;
  for (const auto& one : sys::list_interface_addresses())
    loopback = loopback || (one.address.to_string() == "::ffff:127.0.0.1" && one.prefix_bits == 104);
  CHECK(loopback);
}
