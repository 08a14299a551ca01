// One function per bound type, each in its own *_py.cpp; module.cpp calls them in order. No logic lives in bindings.
#pragma once

#include <pybind11/pybind11.h>

namespace pdxfer {

void bind_errors(pybind11::module_& m);
void bind_config(pybind11::module_& m);
void bind_plan(pybind11::module_& m);
void bind_engine(pybind11::module_& m);
void bind_doctor(pybind11::module_& m);
void bind_rdma(pybind11::module_& m);

}  // namespace pdxfer
