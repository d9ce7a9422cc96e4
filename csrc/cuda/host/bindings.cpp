#include "bindings.h"

#include <pybind11/stl.h>

#include <vector>

#include "ops.h"

namespace py = pybind11;

namespace sparsenet::cuda {

namespace {

using Pointer = std::uintptr_t;

template <typename T>
T* as(Pointer pointer) {
  return reinterpret_cast<T*>(pointer); // NOLINT: Python hands over addresses of tensors that it keeps alive
}

Matrix matrix(Pointer data, int64_t rows, int64_t cols, int64_t stride) { return {as<void>(data), rows, cols, stride}; }

// A validated pattern on the device with its work lists. It owns nothing: the Python object that made the index tensors
// keeps them alive.
struct Pattern {
  PatternView view;
  WorkList forward;
  WorkList transposed;
};

Pattern make_pattern(Pointer crow, Pointer col, Pointer row, Pointer t_crow, Pointer t_row, Pointer t_block,
                     int64_t rows, int64_t cols, int64_t num_blocks, int32_t block_size) {
  return {.view = {.crow = as<int32_t>(crow),
                   .col = as<int32_t>(col),
                   .row = as<int32_t>(row),
                   .t_crow = as<int32_t>(t_crow),
                   .t_row = as<int32_t>(t_row),
                   .t_block = as<int32_t>(t_block),
                   .rows = rows,
                   .cols = cols,
                   .num_blocks = num_blocks,
                   .block_size = block_size},
          .forward = {},
          .transposed = {}};
}

WorkList work_list(Pointer items, int32_t num_items, int32_t num_slots, int32_t rows_per_group) {
  return {as<WorkItem>(items), num_items, num_slots, rows_per_group};
}

LinearForward forward_op(const Pattern& pattern, int32_t dtype, int32_t activation, int64_t batch, Pointer x,
                         int64_t x_stride, Pointer values, Pointer bias, Pointer y, int64_t y_stride,
                         Pointer pre_activation, int64_t pre_activation_stride) {
  return {.pattern = pattern.view,
          .dtype = static_cast<DType>(dtype),
          .activation = static_cast<Activation>(activation),
          .x = matrix(x, batch, pattern.view.cols, x_stride),
          .values = as<void>(values),
          .bias = as<void>(bias),
          .y = matrix(y, batch, pattern.view.rows, y_stride),
          .pre_activation = matrix(pre_activation, batch, pattern.view.rows, pre_activation_stride)};
}

LinearBackward backward_op(const Pattern& pattern, int32_t dtype, int32_t activation, int64_t batch, Pointer grad_y,
                           int64_t grad_y_stride, Pointer saved, int64_t saved_stride, Pointer x, int64_t x_stride,
                           Pointer values, Pointer grad_x, int64_t grad_x_stride, Pointer grad_values,
                           Pointer grad_bias) {
  return {.pattern = pattern.view,
          .dtype = static_cast<DType>(dtype),
          .activation = static_cast<Activation>(activation),
          .grad_y = matrix(grad_y, batch, pattern.view.rows, grad_y_stride),
          .saved = matrix(saved, batch, pattern.view.rows, saved_stride),
          .x = matrix(x, batch, pattern.view.cols, x_stride),
          .values = as<void>(values),
          .grad_x = matrix(grad_x, batch, pattern.view.cols, grad_x_stride),
          .grad_values = as<void>(grad_values),
          .grad_bias = as<void>(grad_bias)};
}

GradientNorms norms_op(int32_t dtype, int32_t block_size, int64_t batch, Pointer x, int64_t in_features,
                       int64_t x_stride, Pointer grad_z, int64_t out_features, int64_t grad_z_stride,
                       int64_t block_row_begin, int64_t block_row_end, Pointer norms) {
  return {.dtype = static_cast<DType>(dtype),
          .block_size = block_size,
          .x = matrix(x, batch, in_features, x_stride),
          .grad_z = matrix(grad_z, batch, out_features, grad_z_stride),
          .block_row_begin = block_row_begin,
          .block_row_end = block_row_end,
          .norms = as<float>(norms)};
}

PlaceGradients candidates_op(int32_t dtype, int32_t block_size, int64_t batch, Pointer x, int64_t in_features,
                             int64_t x_stride, Pointer grad_z, int64_t out_features, int64_t grad_z_stride,
                             Pointer place_rows, Pointer place_cols, int64_t num_places, Pointer grads) {
  return {.dtype = static_cast<DType>(dtype),
          .block_size = block_size,
          .x = matrix(x, batch, in_features, x_stride),
          .grad_z = matrix(grad_z, batch, out_features, grad_z_stride),
          .place_rows = as<int32_t>(place_rows),
          .place_cols = as<int32_t>(place_cols),
          .num_places = num_places,
          .grads = as<void>(grads)};
}

// Index arrays to fill, in the order of Pattern's arguments.
PatternArrays arrays(Pointer crow, Pointer col, Pointer row, Pointer t_crow, Pointer t_row, Pointer t_block,
                     int64_t block_rows, int64_t block_cols, int64_t num_blocks) {
  return {as<int32_t>(crow),    as<int32_t>(col), as<int32_t>(row), as<int32_t>(t_crow), as<int32_t>(t_row),
          as<int32_t>(t_block), block_rows,       block_cols,       num_blocks};
}

Workspace workspace_of(Pointer data, int64_t bytes) { return {as<void>(data), bytes}; }

void register_linear(py::module_& module) {
  py::class_<Pattern>(module, "Pattern", py::module_local())
      .def(py::init(&make_pattern), py::arg("crow"), py::arg("col"), py::arg("row"), py::arg("t_crow"),
           py::arg("t_row"), py::arg("t_block"), py::arg("rows"), py::arg("cols"), py::arg("num_blocks"),
           py::arg("block_size"))
      .def(
          "set_forward_work",
          [](Pattern& self, Pointer items, int32_t num_items, int32_t num_slots, int32_t rows_per_group) {
            self.forward = work_list(items, num_items, num_slots, rows_per_group);
          },
          py::arg("items"), py::arg("num_items"), py::arg("num_slots"), py::arg("rows_per_group"))
      .def(
          "set_transposed_work",
          [](Pattern& self, Pointer items, int32_t num_items, int32_t num_slots, int32_t rows_per_group) {
            self.transposed = work_list(items, num_items, num_slots, rows_per_group);
          },
          py::arg("items"), py::arg("num_items"), py::arg("num_slots"), py::arg("rows_per_group"));

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
      "choose_linear_forward",
      [](const Pattern& pattern, int32_t dtype, int64_t batch, Pointer x, int64_t x_stride, Pointer values) {
        return choose_linear_forward(
            forward_op(pattern, dtype, 0, batch, x, x_stride, values, 0, 0, pattern.view.rows, 0, 0));
      },
      py::arg("pattern"), py::arg("dtype"), py::arg("batch"), py::arg("x"), py::arg("x_stride"), py::arg("values"));
  module.def(
      "linear_forward_workspace_bytes",
      [](const Pattern& pattern, int32_t dtype, int64_t batch, Pointer x, int64_t x_stride, Pointer values) {
        return linear_forward_workspace_bytes(
            forward_op(pattern, dtype, 0, batch, x, x_stride, values, 0, 0, pattern.view.rows, 0, 0), pattern.forward);
      },
      py::arg("pattern"), py::arg("dtype"), py::arg("batch"), py::arg("x"), py::arg("x_stride"), py::arg("values"));
  module.def(
      "linear_forward",
      [](const Pattern& pattern, int32_t dtype, int32_t activation, int64_t batch, Pointer x, int64_t x_stride,
         Pointer values, Pointer bias, Pointer y, int64_t y_stride, Pointer pre_activation,
         int64_t pre_activation_stride, Pointer workspace, int64_t workspace_bytes, Stream stream) {
        linear_forward(forward_op(pattern, dtype, activation, batch, x, x_stride, values, bias, y, y_stride,
                                  pre_activation, pre_activation_stride),
                       pattern.forward, workspace_of(workspace, workspace_bytes), stream);
      },
      py::arg("pattern"), py::arg("dtype"), py::arg("activation"), py::arg("batch"), py::arg("x"), py::arg("x_stride"),
      py::arg("values"), py::arg("bias"), py::arg("y"), py::arg("y_stride"), py::arg("pre_activation"),
      py::arg("pre_activation_stride"), py::arg("workspace"), py::arg("workspace_bytes"), py::arg("stream"),
      py::call_guard<py::gil_scoped_release>());

  // The three that describe a backward call take the same arguments.
  module.def(
      "linear_backward_workspace_bytes",
      [](const Pattern& pattern, int32_t dtype, int32_t activation, int64_t batch, Pointer grad_y,
         int64_t grad_y_stride, Pointer saved, int64_t saved_stride, Pointer x, int64_t x_stride, Pointer values,
         Pointer grad_x, int64_t grad_x_stride, Pointer grad_values, Pointer grad_bias) {
        return linear_backward_workspace_bytes(backward_op(pattern, dtype, activation, batch, grad_y, grad_y_stride,
                                                           saved, saved_stride, x, x_stride, values, grad_x,
                                                           grad_x_stride, grad_values, grad_bias),
                                               pattern.transposed);
      },
      py::arg("pattern"), py::arg("dtype"), py::arg("activation"), py::arg("batch"), py::arg("grad_y"),
      py::arg("grad_y_stride"), py::arg("saved"), py::arg("saved_stride"), py::arg("x"), py::arg("x_stride"),
      py::arg("values"), py::arg("grad_x"), py::arg("grad_x_stride"), py::arg("grad_values"), py::arg("grad_bias"));
  module.def(
      "choose_linear_backward",
      [](const Pattern& pattern, int32_t dtype, int32_t activation, int64_t batch, Pointer grad_y,
         int64_t grad_y_stride, Pointer saved, int64_t saved_stride, Pointer x, int64_t x_stride, Pointer values,
         Pointer grad_x, int64_t grad_x_stride, Pointer grad_values, Pointer grad_bias) {
        const LinearBackward op =
            backward_op(pattern, dtype, activation, batch, grad_y, grad_y_stride, saved, saved_stride, x, x_stride,
                        values, grad_x, grad_x_stride, grad_values, grad_bias);
        return py::make_tuple(choose_grad_input(op), choose_grad_weight(op));
      },
      py::arg("pattern"), py::arg("dtype"), py::arg("activation"), py::arg("batch"), py::arg("grad_y"),
      py::arg("grad_y_stride"), py::arg("saved"), py::arg("saved_stride"), py::arg("x"), py::arg("x_stride"),
      py::arg("values"), py::arg("grad_x"), py::arg("grad_x_stride"), py::arg("grad_values"), py::arg("grad_bias"),
      "Names of the (grad_input, grad_weight) kernels that would run.");
  module.def(
      "linear_backward",
      [](const Pattern& pattern, int32_t dtype, int32_t activation, int64_t batch, Pointer grad_y,
         int64_t grad_y_stride, Pointer saved, int64_t saved_stride, Pointer x, int64_t x_stride, Pointer values,
         Pointer grad_x, int64_t grad_x_stride, Pointer grad_values, Pointer grad_bias, Pointer workspace,
         int64_t workspace_bytes, Stream stream) {
        linear_backward(backward_op(pattern, dtype, activation, batch, grad_y, grad_y_stride, saved, saved_stride, x,
                                    x_stride, values, grad_x, grad_x_stride, grad_values, grad_bias),
                        pattern.transposed, workspace_of(workspace, workspace_bytes), stream);
      },
      py::arg("pattern"), py::arg("dtype"), py::arg("activation"), py::arg("batch"), py::arg("grad_y"),
      py::arg("grad_y_stride"), py::arg("saved"), py::arg("saved_stride"), py::arg("x"), py::arg("x_stride"),
      py::arg("values"), py::arg("grad_x"), py::arg("grad_x_stride"), py::arg("grad_values"), py::arg("grad_bias"),
      py::arg("workspace"), py::arg("workspace_bytes"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
  module.def(
      "activation_backward",
      [](int32_t dtype, int32_t activation, int64_t batch, int64_t features, Pointer grad_y, int64_t grad_y_stride,
         Pointer saved, int64_t saved_stride, Pointer grad_z, int64_t grad_z_stride, Stream stream) {
        activation_backward({.dtype = static_cast<DType>(dtype),
                             .activation = static_cast<Activation>(activation),
                             .grad_y = matrix(grad_y, batch, features, grad_y_stride),
                             .saved = matrix(saved, batch, features, saved_stride),
                             .grad_z = matrix(grad_z, batch, features, grad_z_stride)},
                            stream);
      },
      py::arg("dtype"), py::arg("activation"), py::arg("batch"), py::arg("features"), py::arg("grad_y"),
      py::arg("grad_y_stride"), py::arg("saved"), py::arg("saved_stride"), py::arg("grad_z"), py::arg("grad_z_stride"),
      py::arg("stream"), py::call_guard<py::gil_scoped_release>());
}

void register_gradients(py::module_& module) {
  module.def(
      "choose_gradient_norms",
      [](int32_t dtype, int32_t block_size, int64_t batch, Pointer x, int64_t in_features, int64_t x_stride,
         Pointer grad_z, int64_t out_features, int64_t grad_z_stride) {
        return choose_gradient_norms(
            norms_op(dtype, block_size, batch, x, in_features, x_stride, grad_z, out_features, grad_z_stride, 0, 0, 0));
      },
      py::arg("dtype"), py::arg("block_size"), py::arg("batch"), py::arg("x"), py::arg("in_features"),
      py::arg("x_stride"), py::arg("grad_z"), py::arg("out_features"), py::arg("grad_z_stride"));
  module.def(
      "gradient_norms_workspace_bytes",
      [](int32_t dtype, int32_t block_size, int64_t batch, Pointer x, int64_t in_features, int64_t x_stride,
         Pointer grad_z, int64_t out_features, int64_t grad_z_stride) {
        return gradient_norms_workspace_bytes(
            norms_op(dtype, block_size, batch, x, in_features, x_stride, grad_z, out_features, grad_z_stride, 0, 0, 0));
      },
      py::arg("dtype"), py::arg("block_size"), py::arg("batch"), py::arg("x"), py::arg("in_features"),
      py::arg("x_stride"), py::arg("grad_z"), py::arg("out_features"), py::arg("grad_z_stride"));
  module.def(
      "gradient_norms",
      [](int32_t dtype, int32_t block_size, int64_t batch, Pointer x, int64_t in_features, int64_t x_stride,
         Pointer grad_z, int64_t out_features, int64_t grad_z_stride, int64_t block_row_begin, int64_t block_row_end,
         Pointer norms, Pointer workspace, int64_t workspace_bytes, Stream stream) {
        gradient_norms(norms_op(dtype, block_size, batch, x, in_features, x_stride, grad_z, out_features, grad_z_stride,
                                block_row_begin, block_row_end, norms),
                       workspace_of(workspace, workspace_bytes), stream);
      },
      py::arg("dtype"), py::arg("block_size"), py::arg("batch"), py::arg("x"), py::arg("in_features"),
      py::arg("x_stride"), py::arg("grad_z"), py::arg("out_features"), py::arg("grad_z_stride"),
      py::arg("block_row_begin"), py::arg("block_row_end"), py::arg("norms"), py::arg("workspace"),
      py::arg("workspace_bytes"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
  module.def(
      "candidate_gradients_workspace_bytes",
      [](int32_t dtype, int32_t block_size, int64_t batch, Pointer x, int64_t in_features, int64_t x_stride,
         Pointer grad_z, int64_t out_features, int64_t grad_z_stride, int64_t num_places) {
        return candidate_gradients_workspace_bytes(candidates_op(dtype, block_size, batch, x, in_features, x_stride,
                                                                 grad_z, out_features, grad_z_stride, 0, 0, num_places,
                                                                 0));
      },
      py::arg("dtype"), py::arg("block_size"), py::arg("batch"), py::arg("x"), py::arg("in_features"),
      py::arg("x_stride"), py::arg("grad_z"), py::arg("out_features"), py::arg("grad_z_stride"), py::arg("num_places"));
  module.def(
      "candidate_gradients",
      [](int32_t dtype, int32_t block_size, int64_t batch, Pointer x, int64_t in_features, int64_t x_stride,
         Pointer grad_z, int64_t out_features, int64_t grad_z_stride, Pointer place_rows, Pointer place_cols,
         int64_t num_places, Pointer grads, Pointer workspace, int64_t workspace_bytes, Stream stream) {
        candidate_gradients(candidates_op(dtype, block_size, batch, x, in_features, x_stride, grad_z, out_features,
                                          grad_z_stride, place_rows, place_cols, num_places, grads),
                            workspace_of(workspace, workspace_bytes), stream);
      },
      py::arg("dtype"), py::arg("block_size"), py::arg("batch"), py::arg("x"), py::arg("in_features"),
      py::arg("x_stride"), py::arg("grad_z"), py::arg("out_features"), py::arg("grad_z_stride"), py::arg("place_rows"),
      py::arg("place_cols"), py::arg("num_places"), py::arg("grads"), py::arg("workspace"), py::arg("workspace_bytes"),
      py::arg("stream"), py::call_guard<py::gil_scoped_release>());
}

void register_pattern(py::module_& module) {
  module.def("pattern_workspace_bytes", &pattern_workspace_bytes, py::arg("count"), py::arg("block_rows"),
             py::arg("block_cols"));
  module.def(
      "pattern_from_places",
      [](Pointer place_rows, Pointer place_cols, Pointer crow, Pointer col, Pointer row, Pointer t_crow, Pointer t_row,
         Pointer t_block, int64_t block_rows, int64_t block_cols, int64_t num_blocks, Pointer order, Pointer workspace,
         int64_t workspace_bytes, Stream stream) {
        pattern_from_places(as<int32_t>(place_rows), as<int32_t>(place_cols),
                            arrays(crow, col, row, t_crow, t_row, t_block, block_rows, block_cols, num_blocks),
                            as<int32_t>(order), workspace_of(workspace, workspace_bytes), stream);
      },
      py::arg("place_rows"), py::arg("place_cols"), py::arg("crow"), py::arg("col"), py::arg("row"), py::arg("t_crow"),
      py::arg("t_row"), py::arg("t_block"), py::arg("block_rows"), py::arg("block_cols"), py::arg("num_blocks"),
      py::arg("order"), py::arg("workspace"), py::arg("workspace_bytes"), py::arg("stream"),
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "pattern_from_csr",
      [](Pointer crow_in, int64_t crow_length, Pointer col_in, int64_t rows, int64_t cols, int64_t block_size,
         Pointer crow, Pointer col, Pointer row, Pointer t_crow, Pointer t_row, Pointer t_block, int64_t num_blocks,
         Pointer workspace, int64_t workspace_bytes, Stream stream) {
        const int64_t b = block_size > 0 ? block_size : 1; // refused below
        pattern_from_csr(
            {as<int32_t>(crow_in), as<int32_t>(col_in), crow_length, rows, cols, block_size},
            arrays(crow, col, row, t_crow, t_row, t_block, (rows + b - 1) / b, (cols + b - 1) / b, num_blocks),
            workspace_of(workspace, workspace_bytes), stream);
      },
      py::arg("crow_in"), py::arg("crow_length"), py::arg("col_in"), py::arg("rows"), py::arg("cols"),
      py::arg("block_size"), py::arg("crow"), py::arg("col"), py::arg("row"), py::arg("t_crow"), py::arg("t_row"),
      py::arg("t_block"), py::arg("num_blocks"), py::arg("workspace"), py::arg("workspace_bytes"), py::arg("stream"),
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "select_scores",
      [](Pointer scores, int64_t count, int64_t k, bool highest, Pointer selected, Pointer workspace,
         int64_t workspace_bytes, Stream stream) {
        select_scores(as<float>(scores), count, k, highest, as<int32_t>(selected),
                      workspace_of(workspace, workspace_bytes), stream);
      },
      py::arg("scores"), py::arg("count"), py::arg("k"), py::arg("highest"), py::arg("selected"), py::arg("workspace"),
      py::arg("workspace_bytes"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
  module.def(
      "inactive_places",
      [](const Pattern& pattern, Pointer place_rows, Pointer place_cols, Stream stream) {
        inactive_places(pattern.view, as<int32_t>(place_rows), as<int32_t>(place_cols), stream);
      },
      py::arg("pattern"), py::arg("place_rows"), py::arg("place_cols"), py::arg("stream"),
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "update_pattern",
      [](const Pattern& pattern, Pointer dropped, int64_t num_dropped, Pointer grown_rows, Pointer grown_cols,
         int64_t num_grown, Pointer crow, Pointer col, Pointer row, Pointer t_crow, Pointer t_row, Pointer t_block,
         int64_t num_blocks, Pointer source, Pointer workspace, int64_t workspace_bytes, Stream stream) {
        update_pattern({.old_pattern = pattern.view,
                        .dropped = as<int32_t>(dropped),
                        .num_dropped = num_dropped,
                        .grown_rows = as<int32_t>(grown_rows),
                        .grown_cols = as<int32_t>(grown_cols),
                        .num_grown = num_grown,
                        .out = arrays(crow, col, row, t_crow, t_row, t_block, pattern.view.block_rows(),
                                      pattern.view.block_cols(), num_blocks),
                        .source = as<int32_t>(source)},
                       workspace_of(workspace, workspace_bytes), stream);
      },
      py::arg("pattern"), py::arg("dropped"), py::arg("num_dropped"), py::arg("grown_rows"), py::arg("grown_cols"),
      py::arg("num_grown"), py::arg("crow"), py::arg("col"), py::arg("row"), py::arg("t_crow"), py::arg("t_row"),
      py::arg("t_block"), py::arg("num_blocks"), py::arg("source"), py::arg("workspace"), py::arg("workspace_bytes"),
      py::arg("stream"), py::call_guard<py::gil_scoped_release>());
  module.def(
      "gather_blocks",
      [](Pointer in, Pointer source, Pointer out, int64_t num_blocks, int64_t block_bytes, Stream stream) {
        gather_blocks(as<void>(in), as<int32_t>(source), as<void>(out), num_blocks, block_bytes, stream);
      },
      py::arg("input"), py::arg("source"), py::arg("output"), py::arg("num_blocks"), py::arg("block_bytes"),
      py::arg("stream"), py::call_guard<py::gil_scoped_release>());
  module.def(
      "compact_blocks",
      [](const Pattern& from, const Pattern& to, Pointer rows, Pointer cols, const std::vector<Pointer>& sources,
         const std::vector<Pointer>& targets, const std::vector<int32_t>& element_bytes, Stream stream) {
        std::vector<GatheredBlocks> tensors;
        for (size_t i = 0; i < sources.size(); ++i)
          tensors.push_back({as<void>(sources[i]), as<void>(targets.at(i)), element_bytes.at(i)});
        const py::gil_scoped_release release;
        compact_blocks({.from = from.view,
                        .to = to.view,
                        .rows = as<int32_t>(rows),
                        .cols = as<int32_t>(cols),
                        .tensors = tensors.data(),
                        .num_tensors = static_cast<int64_t>(tensors.size())},
                       stream);
      },
      py::arg("source"), py::arg("target"), py::arg("rows"), py::arg("cols"), py::arg("sources"), py::arg("targets"),
      py::arg("element_bytes"), py::arg("stream"));
  module.def("work_list_capacity", &work_list_capacity, py::arg("num_rows"), py::arg("num_blocks"),
             py::arg("rows_per_group"), py::arg("split_length"));
  module.attr("work_item_bytes") = sizeof(WorkItem);
  module.def(
      "build_work_list",
      [](Pointer crow, int64_t num_rows, int64_t num_blocks, int32_t rows_per_group, int64_t split_length,
         Pointer items, Pointer workspace, int64_t workspace_bytes, Stream stream) {
        WorkList list;
        {
          const py::gil_scoped_release release;
          list = build_work_list(as<int32_t>(crow), num_rows, num_blocks, rows_per_group, split_length,
                                 as<WorkItem>(items), workspace_of(workspace, workspace_bytes), stream);
        }
        return py::make_tuple(list.num_items, list.num_slots);
      },
      py::arg("crow"), py::arg("num_rows"), py::arg("num_blocks"), py::arg("rows_per_group"), py::arg("split_length"),
      py::arg("items"), py::arg("workspace"), py::arg("workspace_bytes"), py::arg("stream"),
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
  cuda::register_linear(module);
  cuda::register_gradients(module);
  cuda::register_pattern(module);
  module.def("device_info", &cuda::device_info_dict);
  module.def(
      "force_variant", [](int32_t variant) { cuda::force_variant(static_cast<cuda::Variant>(variant)); },
      py::arg("variant"), "0: automatic, 1: simt, 2: sm80.");
}

} // namespace sparsenet
