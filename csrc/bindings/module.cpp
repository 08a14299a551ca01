// The Python module pdxfer._core.
#include "bindings/bindings.hpp"

PYBIND11_MODULE(_core, m) {
  m.doc() = "Native core of pdxfer; use the pdxfer package.";
  m.attr("__version__") = PDXFER_VERSION;
  pdxfer::bind_errors(m);
  pdxfer::bind_config(m);
  pdxfer::bind_plan(m);
  pdxfer::bind_engine(m);
  pdxfer::bind_doctor(m);
  pdxfer::bind_rdma(m);
}
