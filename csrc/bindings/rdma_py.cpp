// _core's facts about RDMA NICs for `pdxfer doctor`: what sysfs shows, and what would be chosen for a place. The choice
// is the transport's own function, so doctor cannot say anything else. Called with the GIL held, which it releases.
#include <pybind11/stl.h>

#include <string>

#include "bindings/bindings.hpp"
#include "sys/rdma_devices.hpp"
#include "transport/rdma/rdma_nic.hpp"

namespace py = pybind11;

namespace pdxfer {
namespace {

using transport::rdma::NicChoice;

std::vector<sys::DeviceInfo> read_devices(const std::string& sysfs) {
  const py::gil_scoped_release release;
  return sys::list_rdma_devices(sysfs, sys::list_interface_addresses());
}

py::list gids(const std::vector<sys::GidEntry>& entries) {
  py::list all;
  for (const sys::GidEntry& entry : entries) {
    py::dict one;
    one["index"] = entry.index;
    one["gid"] = entry.gid.to_string();
    one["type"] = sys::gid_type_name(entry.type);
    one["netdev"] = entry.netdev;
    one["link_local"] = entry.gid.is_link_local();
    all.append(one);
  }
  return all;
}

py::list rdma_devices(const std::string& sysfs) {
  py::list all;
  for (const sys::DeviceInfo& device : read_devices(sysfs)) {
    py::dict one;
    one["device"] = device.name;
    one["node_type"] = device.node_type;
    one["firmware"] = device.firmware;
    one["pci"] = device.pci;
    one["numa_node"] = device.place.numa_node;
    py::list ports;
    for (const sys::PortInfo& port : device.ports) {
      py::dict p;
      p["port"] = port.number;
      p["state"] = port.state;
      p["rate"] = port.rate;
      p["link_layer"] = sys::link_layer_name(port.layer);
      p["netdevs"] = port.netdevs;
      p["gids"] = gids(port.gids);
      p["mtu"] = port.active_mtu;
      p["trouble"] = transport::rdma::port_trouble(device, port, RdmaOptions{});
      ports.append(p);
    }
    one["ports"] = ports;
    all.append(one);
  }
  return all;
}

py::dict rdma_choice(const std::string& options, const std::string& pci, const std::string& sysfs) {
  const std::vector<sys::DeviceInfo> devices = read_devices(sysfs);
  const sys::PciPlace near =
      pci.empty() ? sys::PciPlace{} : sys::pci_place(std::filesystem::path(sysfs) / "bus/pci/devices" / pci);
  const NicChoice choice = transport::rdma::choose_nics(devices, near, RdmaOptions::parse(options));
  py::list nics;
  for (const transport::rdma::Nic& nic : choice.nics) {
    py::dict one;
    one["device"] = nic.address.device;
    one["port"] = nic.address.port;
    one["rail"] = nic.address.rail;
    one["distance"] = sys::pci_level_name(nic.distance.level);
    one["why"] = nic.why;
    one["gids"] = gids(nic.address.gids);
    nics.append(one);
  }
  py::dict all;
  all["nics"] = nics;
  all["refused"] = choice.refused;
  return all;
}

}  // namespace

void bind_rdma(py::module_& module) {
  module.def("rdma_devices", &rdma_devices, py::arg("sysfs") = "/sys",
             "RDMA devices with ports, GIDs and interfaces, as the kernel shows them.");
  module.def("rdma_choice", &rdma_choice, py::arg("options") = "", py::arg("pci") = "", py::arg("sysfs") = "/sys",
             "The ports that the options of rdma choose near a PCI device (empty: host memory), and why not others.");
}

}  // namespace pdxfer
