// Config for Python: fields by name, each checked as the environment's are.
#include <pybind11/stl.h>

#include "bindings/bindings.hpp"
#include "core/config.hpp"
#include "core/status.hpp"

namespace py = pybind11;

namespace pdxfer {

void bind_config(py::module_& m) {
  py::class_<Config>(m, "Config")
      .def(py::init([](bool environment) { return environment ? Config::from_environment() : Config{}; }),
           py::kw_only(), py::arg("environment") = true)
      .def(
          "set",
          [](Config& self, const std::string& field, const std::string& value) {
            self.set(field, value, "Config." + field);
          },
          py::arg("field"), py::arg("value"))
      .def("validate", &Config::validate)
      .def("items", &Config::items);
}

}  // namespace pdxfer
