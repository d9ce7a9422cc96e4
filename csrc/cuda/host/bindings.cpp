// What Python can call: unpacks tuples, releases the GIL, calls the ops.
#include "bindings.h"

#include <pybind11/stl.h>

#include <tuple>
#include <utility>
#include <vector>

#include "boundary.h"
#include "ops.h"

namespace py = pybind11;

namespace sparsenet::cuda {

namespace {

using Address = int64_t;

template <typename T>
T* as(Address address) {
  return static_cast<T*>(at(address));
}

Pattern make_pattern(const ArrayAddresses& arrays, int64_t rows, int64_t cols, int64_t num_blocks, int32_t block_size) {
  return {.view = {.crow = as<int32_t>(arrays[0]),
                   .col = as<int32_t>(arrays[1]),
                   .row = as<int32_t>(arrays[2]),
                   .t_crow = as<int32_t>(arrays[3]),
                   .t_row = as<int32_t>(arrays[4]),
                   .t_block = as<int32_t>(arrays[5]),
                   .rows = rows,
                   .cols = cols,
                   .num_blocks = num_blocks,
                   .block_size = block_size},
          .forward = {},
          .transposed = {}};
}

WorkList work_list(Address items, int32_t num_items, int32_t num_slots, int32_t rows_per_group) {
  return {as<WorkItem>(items), num_items, num_slots, rows_per_group};
}

void register_linear(py::module_& module) {
  module.def(
      "linear_forward",
      [](const Pattern& pattern, const LinearCall& call, const Matrix& x, const Weight& weight, const Outputs& outputs,
         const py::tuple& run) {
        const Run where = run_of(run);
        const py::gil_scoped_release release;
        linear_forward(linear_forward_op(pattern.view, call, x, weight, outputs), pattern.forward, where);
      },
      py::arg("pattern"), py::arg("call"), py::arg("x"), py::arg("weight"), py::arg("outputs"), py::arg("run"));
  module.def(
      "linear_backward",
      [](const Pattern& pattern, const LinearCall& call, const Matrix& x, Address values, const Upstream& upstream,
         const Gradients& grads, const py::tuple& run) {
        const Run where = run_of(run);
        const py::gil_scoped_release release;
        linear_backward(linear_backward_op(pattern.view, call, x, at(values), upstream, grads), pattern.transposed,
                        where);
      },
      py::arg("pattern"), py::arg("call"), py::arg("x"), py::arg("values"), py::arg("upstream"), py::arg("grads"),
      py::arg("run"));
  module.def(
      "choose_linear_forward",
      [](const Pattern& pattern, const LinearCall& call, const Matrix& x, const Weight& weight) {
        return choose_linear_forward(linear_forward_op(pattern.view, call, x, weight, {}));
      },
      py::arg("pattern"), py::arg("call"), py::arg("x"), py::arg("weight"));
  module.def(
      "choose_linear_backward",
      [](const Pattern& pattern, const LinearCall& call, const Matrix& x, Address values, const Upstream& upstream,
         const Gradients& grads) {
        const LinearBackward op = linear_backward_op(pattern.view, call, x, at(values), upstream, grads);
        const BackwardNames names = choose_linear_backward(op);
        return py::make_tuple(names.grad_input, names.grad_weight);
      },
      py::arg("pattern"), py::arg("call"), py::arg("x"), py::arg("values"), py::arg("upstream"), py::arg("grads"),
      "Names of the (grad_input, grad_weight) kernels that would run.");
}

void register_gradients(py::module_& module) {
  module.def(
      "gradient_norms",
      [](const GradientCall& call, const Matrix& x, const Matrix& grad_z, const Interval& block_rows, Address norms,
         const py::tuple& run) {
        const Run where = run_of(run);
        const py::gil_scoped_release release;
        gradient_norms(gradient_norms_op(call, x, grad_z, block_rows, at(norms)), where);
      },
      py::arg("call"), py::arg("x"), py::arg("grad_z"), py::arg("block_rows"), py::arg("norms"), py::arg("run"));
  module.def(
      "candidate_gradients",
      [](const GradientCall& call, const Matrix& x, const Matrix& grad_z,
         const std::pair<IndexArray, IndexArray>& places, Address grads, const py::tuple& run) {
        const auto& [rows, cols] = places;
        SPARSENET_CHECK(rows.second == cols.second, "candidate_gradients: rows and cols must be of one length, got ",
                        rows.second, " and ", cols.second);
        const PlaceGradients op{.dtype = call.dtype,
                                .block_size = call.block_size,
                                .x = x,
                                .grad_z = grad_z,
                                .place_rows = indices_at(rows),
                                .place_cols = indices_at(cols),
                                .num_places = rows.second,
                                .grads = at(grads)};
        const Run where = run_of(run);
        const py::gil_scoped_release release;
        candidate_gradients(op, where);
      },
      py::arg("call"), py::arg("x"), py::arg("grad_z"), py::arg("places"), py::arg("grads"), py::arg("run"));
}

void register_pattern(py::module_& module) {
  py::class_<Pattern>(module, "Pattern", py::module_local())
      .def(py::init(&make_pattern), py::arg("arrays"), py::arg("rows"), py::arg("cols"), py::arg("num_blocks"),
           py::arg("block_size"))
      .def(
          "set_forward_work",
          [](Pattern& self, Address items, int32_t num_items, int32_t num_slots, int32_t rows_per_group) {
            self.forward = work_list(items, num_items, num_slots, rows_per_group);
          },
          py::arg("items"), py::arg("num_items"), py::arg("num_slots"), py::arg("rows_per_group"))
      .def(
          "set_transposed_work",
          [](Pattern& self, Address items, int32_t num_items, int32_t num_slots, int32_t rows_per_group) {
            self.transposed = work_list(items, num_items, num_slots, rows_per_group);
          },
          py::arg("items"), py::arg("num_items"), py::arg("num_slots"), py::arg("rows_per_group"));
  module.def(
      "pattern_from_csr",
      [](const IndexArray& crow, const IndexArray& col, Address order,
         const std::tuple<int64_t, int64_t, int64_t>& shape, const ArrayAddresses& arrays, const py::tuple& run) {
        const auto& [rows, cols, block_size] = shape;
        const CsrSource source{.crow = indices_at(crow),
                               .col = indices_at(col),
                               .order = as<int64_t>(order),
                               .crow_length = crow.second,
                               .num_blocks = col.second,
                               .rows = rows,
                               .cols = cols,
                               .block_size = block_size};
        const PatternArrays out{as<int32_t>(arrays[0]), as<int32_t>(arrays[1]), as<int32_t>(arrays[2]),
                                as<int32_t>(arrays[3]), as<int32_t>(arrays[4]), as<int32_t>(arrays[5])};
        const Run where = run_of(run);
        const py::gil_scoped_release release;
        pattern_from_csr(source, out, where);
      },
      py::arg("crow"), py::arg("col"), py::arg("order"), py::arg("shape"), py::arg("arrays"), py::arg("run"));
  module.def(
      "compact_blocks",
      [](const Pattern& from, const Pattern& to, const std::pair<IndexArray, IndexArray>& gathered,
         const std::vector<GatheredBlocks>& tensors, const py::tuple& run) {
        const auto& [rows, cols] = gathered;
        const CompactBlocks op{.from = from.view,
                               .to = to.view,
                               .rows = indices_at(rows),
                               .cols = indices_at(cols),
                               .tensors = tensors.data(),
                               .num_tensors = static_cast<int64_t>(tensors.size())};
        check_gathered_sizes(op, rows.second, cols.second);
        const Run where = run_of(run);
        const py::gil_scoped_release release;
        compact_blocks(op, where);
      },
      py::arg("source"), py::arg("target"), py::arg("gathered"), py::arg("tensors"), py::arg("run"));
}

using LineAddresses = std::tuple<Address, int64_t, int64_t>; // pointers, num_lines, num_blocks
Lines lines_of(const LineAddresses& lines) {
  return {as<int32_t>(std::get<0>(lines)), std::get<1>(lines), std::get<2>(lines)};
}
using ShapeNumbers = std::pair<int32_t, int64_t>; // rows_per_group, split_length

void register_work_lists(py::module_& module) {
  module.def(
      "preferred_rows_per_group",
      [](int32_t dtype, int32_t block_size) { return preferred_rows_per_group(static_cast<DType>(dtype), block_size); },
      py::arg("dtype"), py::arg("block_size"));
  module.def(
      "preferred_work",
      [](const Pattern& pattern, int32_t dtype, int64_t batch, bool transposed) {
        const WorkShape shape = preferred_work(pattern.view, static_cast<DType>(dtype), batch, transposed);
        return py::make_tuple(shape.rows_per_group, shape.split_length);
      },
      py::arg("pattern"), py::arg("dtype"), py::arg("batch"), py::arg("transposed"),
      "(rows_per_group, split_length) of the work list to build; split_length 0: none is read.");
  module.def(
      "work_list_capacity",
      [](const LineAddresses& lines, const ShapeNumbers& shape) {
        return work_list_capacity(lines_of(lines), {shape.first, shape.second});
      },
      py::arg("lines"), py::arg("shape"));
  module.attr("work_item_bytes") = sizeof(WorkItem);
  module.def(
      "build_work_list",
      [](const LineAddresses& lines, const ShapeNumbers& shape, Address items, const py::tuple& run) {
        const Run where = run_of(run);
        WorkList list;
        {
          const py::gil_scoped_release release;
          list = build_work_list(lines_of(lines), {shape.first, shape.second}, as<WorkItem>(items), where);
        }
        return py::make_tuple(list.num_items, list.num_slots);
      },
      py::arg("lines"), py::arg("shape"), py::arg("items"), py::arg("run"),
      "(num_items, num_slots) of the list written to items.");
}

py::dict device_info_dict() {
  const DeviceInfo info = device_info();
  py::dict result;
  result["name"] = info.name;
  result["arch"] = info.arch;
  result["num_multiprocessors"] = info.num_multiprocessors;
  result["shared_bytes_per_cta"] = info.shared_bytes_per_cta;
  result["l2_bytes"] = info.l2_bytes;
  result["memory_bytes"] = info.memory_bytes;
  result["driver_version"] = info.driver_version;
  result["runtime_version"] = info.runtime_version;
  result["num_devices"] = info.num_devices;
  result["status"] = info.status;
  return result;
}

} // namespace

} // namespace sparsenet::cuda

namespace sparsenet {

void register_cuda(py::module_& module) {
  cuda::register_pattern(module);
  cuda::register_linear(module);
  cuda::register_gradients(module);
  cuda::register_work_lists(module);
  module.def("device_info", &cuda::device_info_dict);
  module.def(
      "force_variant", [](int32_t variant) { cuda::force_variant(static_cast<cuda::Variant>(variant)); },
      py::arg("variant"), "0: automatic, 1: simt, 2: sm80.");
}

} // namespace sparsenet
