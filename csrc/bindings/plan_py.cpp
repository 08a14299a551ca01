// Python names of the plan: Layout, Pairing, TransferPlan, pair_layouts, make_plan, plan_from_extents, execute_local.
//
// Arrays are borrowed for the call; the GIL is released while native code runs. Errors leave as pdxfer::Error, which
// errors_py.cpp translates; an argument of the wrong kind is a TypeError.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/bindings.hpp"
#include "core/paged_copy.hpp"
#include "pack/paged_copy_host.hpp"
#include "plan/layout.hpp"
#include "plan/make_copy.hpp"

namespace py = pybind11;

namespace pdxfer {
namespace {

template <typename T>
using Column = py::array_t<T, py::array::c_style>;

// A one-dimensional array of integers, as NumPy sees `object`. Floats and booleans are refused, not rounded.
py::array integers(const py::object& object, const std::string& name) {
  py::array array = py::array::ensure(object);
  if (!array) {
    PyErr_Clear();
    throw py::type_error(name + " must be a one-dimensional integer array, not " +
                         std::string(py::str(py::type::of(object).attr("__name__"))));
  }
  const char kind = array.dtype().kind();
  if (kind != 'i' && kind != 'u' && array.size() != 0)  // an empty list is float64 to NumPy
    throw py::type_error(name + " has dtype " + std::string(py::str(array.dtype())) +
                         ": pass integers (int32 is taken without a copy)");
  if (array.ndim() != 1)
    throw Error(Code::kInvalid,
                name + " has " + std::to_string(array.ndim()) + " dimensions: pass one, page numbers in order");
  return array;
}

template <typename T>
Column<T> column(const py::object& object, const std::string& name) {
  auto out = Column<T>::ensure(integers(object, name).attr("astype")(py::dtype::of<T>(), "C", "unsafe", false, false));
  if (!out) throw py::error_already_set();
  return out;
}

// Region ids, range-checked: narrowing must not turn a wrong id into a valid one.
std::vector<uint32_t> region_ids(const py::object& object, const std::string& name) {
  const auto wide = column<int64_t>(object, name);
  std::vector<uint32_t> ids(static_cast<size_t>(wide.size()));
  for (size_t i = 0; i < ids.size(); ++i) {
    const int64_t id = wide.data()[i];
    if (id < 0 || id > UINT32_MAX)
      throw Error(Code::kInvalid, name + "[" + std::to_string(i) + "] is " + std::to_string(id) +
                                      ": pass the id of a registered region");
    ids[i] = static_cast<uint32_t>(id);
  }
  return ids;
}

template <typename T>
std::span<const T> view(const Column<T>& array) {
  return {array.data(), static_cast<size_t>(array.size())};
}

bool is_int32(const py::array& array) { return array.dtype().kind() == 'i' && array.itemsize() == 4; }

// `object` itself when it is a one-dimensional array of T without gaps; nothing of NumPy is called for it, because a
// plan is mostly made when none of that is in the caches.
template <typename T>
std::optional<Column<T>> as_it_is(const py::object& object) {
  if (!py::isinstance<py::array>(object)) return std::nullopt;
  const auto array = py::reinterpret_borrow<py::array>(object);
  const py::dtype type = array.dtype();
  if (type.kind() != 'i' || type.itemsize() != sizeof(T) || type.byteorder() != '=') return std::nullopt;
  if (array.ndim() != 1 || (array.flags() & py::array::c_style) == 0) return std::nullopt;
  return py::reinterpret_borrow<Column<T>>(object);
}

// The page arrays of one part: both as int32, without a copy when they are contiguous, or both as int64.
struct Pages {
  std::optional<std::pair<Column<int32_t>, Column<int32_t>>> narrow;
  std::optional<std::pair<Column<int64_t>, Column<int64_t>>> wide;

  Pages(const py::object& src_object, const py::object& dst_object) {
    auto src32 = as_it_is<int32_t>(src_object), dst32 = as_it_is<int32_t>(dst_object);
    if (src32 && dst32) {
      narrow.emplace(std::move(*src32), std::move(*dst32));
      return;
    }
    const py::array src = integers(src_object, "src_pages"), dst = integers(dst_object, "dst_pages");
    if (is_int32(src) && is_int32(dst))
      narrow.emplace(column<int32_t>(src, "src_pages"), column<int32_t>(dst, "dst_pages"));
    else
      wide.emplace(column<int64_t>(src, "src_pages"), column<int64_t>(dst, "dst_pages"));
  }
};

// One part of a plan, its arrays looked at while the GIL is held: NumPy's accessors need it.
class Work {
 public:
  Work(const plan::Pairing& pairing, const py::object& src, const py::object& dst, bool allow_duplicates)
      : pairing_(pairing), pages_(src, dst), options_{allow_duplicates} {
    if (pages_.narrow) {
      src32_ = view(pages_.narrow->first);
      dst32_ = view(pages_.narrow->second);
    } else {
      src64_ = view(pages_.wide->first);
      dst64_ = view(pages_.wide->second);
    }
  }

  // Without the GIL.
  PagedCopy copy() const {
    return pages_.narrow ? plan::make_copy(pairing_, src32_, dst32_, options_)
                         : plan::make_copy(pairing_, src64_, dst64_, options_);
  }

 private:
  const plan::Pairing& pairing_;
  Pages pages_;
  plan::RunOptions options_;
  std::span<const int32_t> src32_, dst32_;
  std::span<const int64_t> src64_, dst64_;
};

std::shared_ptr<TransferPlan> make_plan(const plan::Pairing& pairing, const py::object& src, const py::object& dst,
                                        bool allow_duplicates) {
  const Work work(pairing, src, dst, allow_duplicates);
  py::gil_scoped_release unlocked;
  auto out = std::make_shared<TransferPlan>();
  out->copies.push_back(work.copy());
  return out;
}

using Part = std::tuple<std::shared_ptr<plan::Pairing>, py::object, py::object, bool>;

std::shared_ptr<TransferPlan> make_plan_of_parts(const std::vector<Part>& parts) {
  std::vector<Work> work;
  work.reserve(parts.size());
  for (const auto& [pairing, src, dst, allow_duplicates] : parts) {
    if (!pairing) throw py::type_error("a part of a plan begins with a Pairing, not None");
    work.emplace_back(*pairing, src, dst, allow_duplicates);
  }
  auto out = std::make_shared<TransferPlan>();
  py::gil_scoped_release unlocked;
  out->copies.reserve(work.size());
  for (const Work& w : work) out->copies.push_back(w.copy());
  return out;
}

std::shared_ptr<TransferPlan> plan_from_extents(const py::object& src_ids, const py::object& src_offsets,
                                                const py::object& dst_ids, const py::object& dst_offsets,
                                                const py::object& lengths) {
  const auto a = region_ids(src_ids, "src_ids"), c = region_ids(dst_ids, "dst_ids");
  const auto b = column<uint64_t>(src_offsets, "src_offsets"), d = column<uint64_t>(dst_offsets, "dst_offsets");
  const auto e = column<uint64_t>(lengths, "lengths");
  const plan::Extents extents{a, view(b), c, view(d), view(e)};
  auto out = std::make_shared<TransferPlan>();
  py::gil_scoped_release unlocked;
  out->copies.push_back(plan::extents_copy(extents));
  return out;
}

const PagedCopy& copy_of(const TransferPlan& plan, size_t copy) {
  if (copy >= plan.copies.size())
    throw Error(Code::kInvalid, "copy " + std::to_string(copy) + " of a plan of " + std::to_string(plan.copies.size()));
  return plan.copies[copy];
}

py::array_t<uint32_t> runs_of(const TransferPlan& plan, size_t copy) {
  static_assert(sizeof(Run) == 3 * sizeof(uint32_t));
  const auto& runs = copy_of(plan, copy).runs;
  return py::array_t<uint32_t>({runs.size(), size_t{3}}, reinterpret_cast<const uint32_t*>(runs.data()));
}

py::array_t<uint64_t> rows(const std::vector<RegionPair>& pairs) {
  py::array_t<uint64_t> out({pairs.size(), size_t{7}});
  auto to = out.mutable_unchecked<2>();
  for (size_t i = 0; i < pairs.size(); ++i) {
    const RegionPair& p = pairs[i];
    const uint64_t row[] = {p.src, p.dst, p.src_offset, p.dst_offset, p.src_stride, p.dst_stride, p.slot_bytes};
    for (size_t k = 0; k < 7; ++k) to(static_cast<py::ssize_t>(i), static_cast<py::ssize_t>(k)) = row[k];
  }
  return out;
}

size_t total(const TransferPlan& plan, bool runs) {
  size_t n = 0;
  for (const PagedCopy& copy : plan.copies) n += runs ? copy.runs.size() : copy.pairs.size();
  return n;
}

// Buffers by region id, held for as long as their bytes are in use.
struct Memory {
  std::map<RegionId, py::buffer_info> buffers;

  Memory(const py::dict& objects, const char* side, bool writable) {
    for (const auto& [id, object] : objects) {
      if (!py::isinstance<py::buffer>(object))
        throw py::type_error(std::string(side) + "[" + std::string(py::str(id)) + "] does not give a buffer");
      py::buffer_info info = py::reinterpret_borrow<py::buffer>(object).request(writable);
      py::ssize_t expected = info.itemsize;
      for (size_t axis = info.shape.size(); axis-- > 0; expected *= info.shape[axis])
        if (info.shape[axis] > 1 && info.strides[axis] != expected)
          throw Error(Code::kInvalid,
                      std::string(side) + "[" + std::string(py::str(id)) + "] is not contiguous in memory");
      buffers.emplace(py::cast<RegionId>(id), std::move(info));
    }
  }
  uint64_t bytes(RegionId id) const {
    const auto at = buffers.find(id);
    return at == buffers.end() ? 0 : static_cast<uint64_t>(at->second.size * at->second.itemsize);
  }
  std::byte* data(RegionId id) const { return static_cast<std::byte*>(buffers.at(id).ptr); }
};

uint64_t execute_local(const TransferPlan& plan, const py::dict& src, const py::dict& dst, unsigned threads,
                       uint64_t chunk_bytes) {
  const Memory from(src, "src", false), to(dst, "dst", true);
  if (chunk_bytes == 0) throw Error(Code::kInvalid, "chunk_bytes is 0: give the bytes of one step, at least 1");
  for (const PagedCopy& copy : plan.copies) {
    Status status = check_range(copy, Side::kSrc, [&](RegionId id) { return from.bytes(id); });
    if (status.ok()) status = check_range(copy, Side::kDst, [&](RegionId id) { return to.bytes(id); });
    if (!status.ok()) throw Error(status.code, std::string("the plan does not fit the buffers given: ") + status.where);
  }
  uint64_t bytes = 0;
  py::gil_scoped_release unlocked;
  pack::HostCopier copier(threads);
  for (const PagedCopy& copy : plan.copies) {
    std::vector<std::byte*> src_base, dst_base;
    for (const RegionPair& pair : copy.pairs) {
      src_base.push_back(from.data(pair.src));
      dst_base.push_back(to.data(pair.dst));
    }
    Cursor cursor;
    while (const uint64_t step = copier.copy(copy, cursor, chunk_bytes, src_base, dst_base)) bytes += step;
  }
  return bytes;
}

std::string plan_text(const TransferPlan& plan) {
  return "<TransferPlan " + std::to_string(plan.bytes()) + " bytes: " + std::to_string(total(plan, false)) +
         " pairs, " + std::to_string(total(plan, true)) + " runs in " + std::to_string(plan.copies.size()) + " copies>";
}

void bind_layouts(py::module_& m) {
  using plan::Layout;
  using plan::LayoutBuffer;
  using plan::Pairing;
  py::class_<Layout, std::shared_ptr<Layout>>(m, "Layout",
                                              "One rank's KV cache as the plan sees it; see pdxfer.KvLayout.")
      .def(py::init([](const std::vector<std::pair<RegionId, uint64_t>>& buffers, std::vector<uint64_t> page_bytes,
                       uint64_t slots, uint32_t page_size, uint32_t groups, std::vector<int64_t> layers,
                       uint32_t total_heads, uint32_t tp_size, uint32_t tp_rank, std::string dtype) {
             auto layout = std::make_shared<Layout>();
             for (const auto& [region, offset] : buffers) layout->buffers.push_back({region, offset});
             layout->page_bytes = std::move(page_bytes);
             layout->slots = slots;
             layout->page_size = page_size;
             layout->groups = groups;
             layout->layers = std::move(layers);
             layout->total_heads = total_heads;
             layout->tp_size = tp_size;
             layout->tp_rank = tp_rank;
             layout->dtype = std::move(dtype);
             layout->validate("this");
             return layout;
           }),
           py::kw_only(), py::arg("buffers"), py::arg("page_bytes"), py::arg("slots"), py::arg("page_size") = 1,
           py::arg("groups") = 1, py::arg("layers") = std::vector<int64_t>{}, py::arg("total_heads") = 0,
           py::arg("tp_size") = 1, py::arg("tp_rank") = 0, py::arg("dtype") = "");
  py::class_<Pairing, std::shared_ptr<Pairing>>(m, "Pairing", "Two layouts, matched and validated; reusable.")
      .def(
          "pairs", [](const Pairing& p) { return rows(p.pairs); },
          "uint64 (n, 7): src region, dst region, src offset, dst offset, src stride, dst stride, slot bytes.")
      .def_readonly("slots_per_page", &Pairing::slots_per_page, "1: slots are pages; page_size: slots are tokens.")
      .def_readonly("src_pages", &Pairing::src_pages, "Source page numbers are below this.")
      .def_readonly("dst_pages", &Pairing::dst_pages, "Destination page numbers are below this.")
      .def_readonly("redundant", &Pairing::redundant, "Another source rank already writes these bytes.")
      .def_property_readonly("bytes_per_page", &Pairing::bytes_per_page, "Bytes one page moves, all buffers together.");
  m.def("pair_layouts", &plan::pair_layouts, py::arg("src"), py::arg("dst"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace

void bind_plan(py::module_& m) {
  bind_layouts(m);
  py::class_<TransferPlan, std::shared_ptr<TransferPlan>>(m, "TransferPlan", "What one batch moves: pairs x runs.")
      .def_property_readonly("bytes", &TransferPlan::bytes, "Payload in bytes.")
      .def_property_readonly(
          "copies", [](const TransferPlan& p) { return p.copies.size(); }, "Number of parts.")
      .def_property_readonly("pair_count", [](const TransferPlan& p) { return total(p, false); })
      .def_property_readonly("run_count", [](const TransferPlan& p) { return total(p, true); })
      .def("runs", &runs_of, py::arg("copy") = 0, "uint32 (n, 3): src slot, dst slot, count; of one part.")
      .def(
          "pairs", [](const TransferPlan& p, size_t copy) { return rows(copy_of(p, copy).pairs); }, py::arg("copy") = 0,
          "uint64 (n, 7): src region, dst region, src offset, dst offset, src stride, dst stride, slot bytes.")
      .def("__repr__", &plan_text);
  m.def("make_plan", &make_plan, py::arg("pairing").none(false), py::arg("src_pages"), py::arg("dst_pages"),
        py::arg("allow_duplicates"));
  m.def("make_plan", &make_plan_of_parts, py::arg("parts"),
        "parts: (Pairing, src_pages, dst_pages, allow_duplicates) each.");
  m.def("plan_from_extents", &plan_from_extents, py::arg("src_ids"), py::arg("src_offsets"), py::arg("dst_ids"),
        py::arg("dst_offsets"), py::arg("lengths"));
  m.def("execute_local", &execute_local, py::arg("plan"), py::arg("src"), py::arg("dst"), py::arg("threads") = 1,
        py::arg("chunk_bytes") = uint64_t{1} << 20,
        "Carry out a plan inside this process, for debugging: src and dst map region ids to buffers. Returns bytes.");
}

}  // namespace pdxfer
