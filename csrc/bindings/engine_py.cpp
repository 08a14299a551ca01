// Engine, batches, peers and regions for Python. Everything that can wait releases the GIL; no Python object is ever
// touched by a native thread.
#include <pybind11/stl.h>

#include "bindings/bindings.hpp"
#include "engine/engine.hpp"

namespace py = pybind11;
using namespace pdxfer::engine;

namespace pdxfer {
namespace {

using NoGil = py::call_guard<py::gil_scoped_release>;

std::chrono::milliseconds milliseconds(double seconds) {
  // A day is for ever here, and keeps the arithmetic of deadlines far from overflow.
  return std::chrono::milliseconds(static_cast<int64_t>(std::clamp(seconds, 0.0, 86400.0) * 1e3));
}

Bytes bytes_of(const py::bytes& data) {
  const std::string_view view = data;
  const auto raw = std::as_bytes(std::span(view));
  return Bytes(raw.begin(), raw.end());
}

py::bytes to_python(const Bytes& data) { return py::bytes(reinterpret_cast<const char*>(data.data()), data.size()); }

// A number, or the peer itself: asking that for its number in Python costs as much as the rest of a call.
PeerId peer_id_of(const py::object& peer) {
  if (PyLong_Check(peer.ptr())) return py::cast<PeerId>(peer);
  if (!py::isinstance<PeerState>(peer))
    throw py::type_error("expected a Peer or its id, not " + std::string(py::repr(peer)));
  return py::cast<const PeerState&>(peer).id;
}

uint64_t pointer_of(const Region& region) { return reinterpret_cast<uint64_t>(region.buffer.data); }

// A forked child leaks its copy.
struct LeakInForkedChild {
  void operator()(Engine* engine) const {
    if (engine->in_own_process()) delete engine;
  }
};

void throw_status(const Status& status, const std::string& doing) {
  if (!status.ok()) throw Error(status.code, doing + ": " + status.to_string(), status.native);
}

void bind_batch(py::module_& m) {
  py::class_<Batch, std::shared_ptr<Batch>>(m, "Batch")
      .def_readonly("id", &Batch::id)
      .def_readonly("peer_id", &Batch::peer)
      .def_property_readonly("bytes", [](const Batch& self) { return self.plan->bytes(); })
      .def("poll", &Batch::done)
      .def_property_readonly("status",
                             [](const Batch& self) { return self.done() ? self.status().to_string() : "in flight"; })
      .def(
          "wait",
          [](const Batch& self, double timeout) {
            if (!self.wait_until(std::chrono::steady_clock::now() + milliseconds(timeout)))
              throw Error(Code::kTimeout, "batch " + std::to_string(self.id) + " is still in flight after " +
                                              std::to_string(timeout) + " s; it goes on: wait again or cancel it");
            throw_status(self.status(), "batch " + std::to_string(self.id) + " to peer " + std::to_string(self.peer));
          },
          py::arg("timeout"), NoGil());
}

void bind_views(py::module_& m) {
  py::class_<Region>(m, "Region")
      .def_readonly("id", &Region::id)
      .def_property_readonly("pointer", &pointer_of)
      .def_property_readonly("bytes", [](const Region& self) { return self.buffer.bytes; })
      .def_property_readonly("device", [](const Region& self) { return self.buffer.device; });
  py::class_<PeerState, std::shared_ptr<PeerState>>(m, "Peer")
      .def_readonly("id", &PeerState::id)
      .def_readonly("accepted", &PeerState::accepted)
      .def_property_readonly("name", [](const PeerState& self) { return self.identity.name; })
      .def_property_readonly("instance",
                             [](const PeerState& self) {
                               return to_python(Bytes(self.identity.instance.begin(), self.identity.instance.end()));
                             })
      .def_readonly("address", &PeerState::address)
      .def_readonly("transport", &PeerState::transport_name)
      .def_readonly("passed_over", &PeerState::passed_over)
      .def_property_readonly("alive", &PeerState::alive)
      .def_property_readonly("lost_reason", &PeerState::lost_reason)
      .def_property_readonly("link", &PeerState::link_text)
      .def_property_readonly("regions", [](const PeerState& self) { return self.regions.all(); })
      .def_property_readonly("batches_sent", [](const PeerState& self) { return self.batches_sent.load(); })
      .def_property_readonly("bytes_sent", [](const PeerState& self) { return self.bytes_sent.load(); })
      .def_property_readonly("batches_failed", [](const PeerState& self) { return self.batches_failed.load(); })
      .def_property_readonly("batches_arrived", [](const PeerState& self) { return self.batches_arrived.load(); })
      .def(
          "find_region",
          [](const PeerState& self, uint64_t pointer, uint64_t bytes, double timeout) -> std::pair<Region, uint64_t> {
            const auto region = self.regions.find(pointer, bytes, milliseconds(timeout));
            if (region) return {*region, pointer - pointer_of(*region)};
            if (!self.alive())
              throw Error(Code::kPeerLost, "peer " + std::to_string(self.id) + " is lost: " + self.lost_reason());
            throw Error(Code::kInvalid, "peer " + std::to_string(self.id) + " (" + self.address +
                                            ") has registered no memory that holds " + std::to_string(bytes) +
                                            " bytes at " + std::to_string(pointer));
          },
          py::arg("pointer"), py::arg("bytes"), py::arg("timeout") = 1.0, NoGil());
  py::class_<Completion>(m, "Arrival")
      .def_readonly("peer_id", &Completion::peer)
      .def_readonly("tag", &Completion::tag)
      .def_property_readonly("tail", [](const Completion& self) { return to_python(self.tail); })
      .def_property_readonly("ok", [](const Completion& self) { return self.status.ok(); })
      .def_property_readonly("status", [](const Completion& self) { return self.status.to_string(); });
}

}  // namespace

void bind_engine(py::module_& m) {
  bind_batch(m);
  bind_views(m);
  py::class_<Engine, std::unique_ptr<Engine, LeakInForkedChild>>(m, "Engine")
      .def(py::init<Config>(), py::arg("config"), NoGil())
      .def_property_readonly("address", &Engine::address)
      .def_property_readonly("name", [](const Engine& self) { return self.identity().name; })
      .def_property_readonly("config", [](const Engine& self) { return self.config().items(); })
      .def_property_readonly("transports", &Engine::transports)
      .def_property_readonly("in_flight", &Engine::in_flight)
      .def_property_readonly("in_own_process", &Engine::in_own_process)
      .def(
          "register_memory",
          [](Engine& self, uint64_t pointer, uint64_t bytes, int device) {
            return self.register_memory({reinterpret_cast<std::byte*>(pointer), bytes, device});
          },
          py::arg("pointer"), py::arg("bytes"), py::arg("device"), NoGil())
      .def("deregister_memory", &Engine::deregister_memory, py::arg("region_id"), NoGil())
      .def(
          "find_region",
          [](const Engine& self, uint64_t pointer, uint64_t bytes) -> std::pair<Region, uint64_t> {
            const auto region = self.regions().find(pointer, bytes, std::chrono::milliseconds(0));
            if (!region)
              throw Error(Code::kInvalid, "no registered region holds " + std::to_string(bytes) + " bytes at " +
                                              std::to_string(pointer) + "; register the memory first");
            return {*region, pointer - pointer_of(*region)};
          },
          py::arg("pointer"), py::arg("bytes"), NoGil())
      .def(
          "connect",
          [](Engine& self, const std::string& address, double timeout) {
            return self.peer(self.connect(address, milliseconds(timeout)));
          },
          py::arg("address"), py::arg("timeout"), NoGil())
      .def("disconnect", &Engine::disconnect, py::arg("peer_id"), NoGil())
      .def("peer", &Engine::peer, py::arg("peer_id"), NoGil())
      .def("peers", &Engine::peers, NoGil())
      .def(
          "submit",
          [](Engine& self, const py::object& peer, std::shared_ptr<TransferPlan> plan, std::optional<uint64_t> tag,
             const py::bytes& tail) {
            const PeerId id = peer_id_of(peer);
            Bytes raw = bytes_of(tail);
            py::gil_scoped_release release;
            return self.submit(id, std::move(plan), tag, std::move(raw));
          },
          py::arg("peer"), py::arg("plan"), py::arg("tag"), py::arg("tail"))
      .def(
          "cancel", [](Engine& self, const std::shared_ptr<Batch>& batch) { self.cancel(batch); }, py::arg("batch"),
          NoGil())
      .def("poll", &Engine::poll, py::arg("max_completions"), NoGil())
      .def("close", &Engine::close, NoGil());
}

}  // namespace pdxfer
