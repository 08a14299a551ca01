// The only translator from pdxfer::Error and Status to Python exceptions.
#include <exception>

#include "bindings/bindings.hpp"
#include "core/status.hpp"

namespace py = pybind11;

namespace pdxfer {
namespace {

// Created once with the module and kept for the life of the process, as Python keeps its own.
struct Classes {
  PyObject* by_code[8] = {};
};
Classes g_classes;

PyObject* make(py::module_& m, const char* name, PyObject* base, PyObject* builtin, const char* doc) {
  const py::tuple bases = builtin == nullptr ? py::tuple(py::make_tuple(py::handle(base)))
                                             : py::tuple(py::make_tuple(py::handle(base), py::handle(builtin)));
  PyObject* cls = PyErr_NewExceptionWithDoc((std::string("pdxfer.") + name).c_str(), doc, bases.ptr(), nullptr);
  if (cls == nullptr) throw py::error_already_set();
  m.add_object(name, py::handle(cls));
  return cls;
}

void raise(const Error& error) {
  PyObject* cls = g_classes.by_code[static_cast<int>(error.code())];
  const py::object instance = py::reinterpret_borrow<py::object>(cls)(error.what());
  instance.attr("native") = error.status().native;
  PyErr_SetObject(cls, instance.ptr());
}

}  // namespace

void bind_errors(py::module_& m) {
  PyObject* root = make(m, "PdxferError", PyExc_Exception, nullptr,
                        "Base of every error of pdxfer. `native` is the errno or library code, 0 when there is none.");
  auto& by = g_classes.by_code;
  by[static_cast<int>(Code::kOk)] = root;
  by[static_cast<int>(Code::kInvalid)] = make(m, "InvalidError", root, PyExc_ValueError,
                                              "An argument is wrong: an id, an index, a range, a layout, a setting.");
  by[static_cast<int>(Code::kUnavailable)] =
      make(m, "UnavailableError", root, PyExc_RuntimeError,
           "This machine or the peer cannot do it: permission, library, version, secret, capacity.");
  by[static_cast<int>(Code::kPeerLost)] = make(m, "PeerLostError", root, PyExc_ConnectionError,
                                               "The peer died, hung or closed while work was outstanding.");
  by[static_cast<int>(Code::kTimeout)] =
      make(m, "TransferTimeout", root, PyExc_TimeoutError, "A bounded wait ran out.");
  by[static_cast<int>(Code::kCancelled)] =
      make(m, "CancelledError", root, nullptr, "The batch was cancelled; nothing of it lands any more.");
  by[static_cast<int>(Code::kInternal)] =
      make(m, "InternalError", root, PyExc_RuntimeError, "A bug of pdxfer: please report it.");
  by[static_cast<int>(Code::kCorrupt)] =
      make(m, "CorruptionError", root, PyExc_RuntimeError,
           "What landed is not what was sent (`cuda` option `checksum`): nothing of the batch may be used.");
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const Error& error) {
      raise(error);
    }
  });
}

}  // namespace pdxfer
