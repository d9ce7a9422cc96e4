// PYBIND11_MODULE(_C): the complete list of what Python can call. Tensors arrive as addresses and sizes, checked by
// sparsenet/functional.py; index arrays arrive as numpy arrays and are checked here. Kernels run without the GIL.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "cpu/block_pattern.h"
#include "cpu/compact_blocks.h"
#include "cpu/isa.h"
#include "cpu/threads.h"
#include "cpu/workspace.h"
#include "check.h"
#include "types.h"
#if defined(SPARSENET_CUDA)
  #include "cuda/bindings_cuda.h"
#endif

namespace py = pybind11;
using namespace sparsenet;

namespace {

using Indices = py::array_t<int32_t, py::array::c_style>;
using Address = uintptr_t;

void* at(Address address) { return reinterpret_cast<void*>(address); }

Matrix matrix(Address data, int64_t rows, int64_t cols, int64_t stride) { return {at(data), rows, cols, stride}; }

// For results, which torch allocated in one piece and this call writes whole.
void use_huge_pages(const Matrix& m, DType dtype) {
  cpu::use_huge_pages(m.data, m.rows * m.cols * element_bytes(dtype));
}

template <typename T> py::array_t<T> to_numpy(const std::vector<T>& v) {
  return py::array_t<T>(static_cast<py::ssize_t>(v.size()), v.data());
}

py::array_t<int32_t> copy_of(const int32_t* data, int64_t count) { return py::array_t<int32_t>(count, data); }

void linear_forward(const cpu::Pattern& pattern, int dtype, int activation, Address x, int64_t x_stride, int64_t batch,
                    Address values, Address bias, Address y, Address pre_activation, int threads) {
  const PatternView& p = pattern.view();
  const LinearForward op = {.pattern = p,
                            .dtype = DType(dtype),
                            .activation = Activation(activation),
                            .x = matrix(x, batch, p.cols, x_stride),
                            .values = at(values),
                            .bias = at(bias),
                            .y = matrix(y, batch, p.rows, p.rows),
                            .pre_activation = matrix(pre_activation, batch, p.rows, p.rows)};
  py::gil_scoped_release release;
  use_huge_pages(op.y, op.dtype);
  use_huge_pages(op.pre_activation, op.dtype);
  cpu::kernels_for(op.dtype).linear_forward(op, cpu::usable_threads(threads));
}

void linear_backward(const cpu::Pattern& pattern, int dtype, int activation, Address grad_y, int64_t grad_y_stride,
                     Address saved, Address x, int64_t x_stride, int64_t batch, Address values, Address grad_x,
                     Address grad_values, Address grad_bias, int threads) {
  const PatternView& p = pattern.view();
  const LinearBackward op = {.pattern = p,
                             .dtype = DType(dtype),
                             .activation = Activation(activation),
                             .grad_y = matrix(grad_y, batch, p.rows, grad_y_stride),
                             .saved = matrix(saved, batch, p.rows, p.rows),
                             .x = matrix(x, batch, p.cols, x_stride),
                             .values = at(values),
                             .grad_x = matrix(grad_x, batch, p.cols, p.cols),
                             .grad_values = at(grad_values),
                             .grad_bias = at(grad_bias)};
  py::gil_scoped_release release;
  use_huge_pages(op.grad_x, op.dtype);
  cpu::use_huge_pages(op.grad_values, p.num_blocks * p.block_size * p.block_size * element_bytes(op.dtype));
  cpu::kernels_for(op.dtype).linear_backward(op, cpu::usable_threads(threads));
}

void gradient_norms(int dtype, int block_size, Address x, int64_t x_stride, int64_t in, Address grad_z,
                    int64_t grad_z_stride, int64_t out, int64_t batch, int64_t block_row_begin, int64_t block_row_end,
                    Address norms, int threads) {
  const GradientNorms op = {.dtype = DType(dtype),
                            .block_size = block_size,
                            .x = matrix(x, batch, in, x_stride),
                            .grad_z = matrix(grad_z, batch, out, grad_z_stride),
                            .block_row_begin = block_row_begin,
                            .block_row_end = block_row_end,
                            .norms = static_cast<float*>(at(norms))};
  py::gil_scoped_release release;
  cpu::kernels_for(op.dtype).gradient_norms(op, cpu::usable_threads(threads));
}

void candidate_gradients(int dtype, int block_size, Address x, int64_t x_stride, int64_t in, Address grad_z,
                         int64_t grad_z_stride, int64_t out, int64_t batch, const Indices& rows, const Indices& cols,
                         Address grads, int threads) {
  const cpu::PlacesByRow places(rows.data(), cols.data(), rows.size(), (out + block_size - 1) / block_size);
  const CandidateGradients op = {.dtype = DType(dtype),
                                 .block_size = block_size,
                                 .x = matrix(x, batch, in, x_stride),
                                 .grad_z = matrix(grad_z, batch, out, grad_z_stride),
                                 .crow = places.crow.data(),
                                 .col = places.col.data(),
                                 .block = places.number.data(),
                                 .num_places = rows.size(),
                                 .grads = at(grads)};
  py::gil_scoped_release release;
  cpu::kernels_for(op.dtype).candidate_gradients(op, cpu::usable_threads(threads));
}

void compact_blocks(const cpu::Pattern& from, const cpu::Pattern& to, const Indices& rows, const Indices& cols,
                    const std::vector<Address>& sources, const std::vector<Address>& targets,
                    const std::vector<int>& element_bytes, int threads) {
  std::vector<GatheredBlocks> tensors;
  for (size_t i = 0; i < sources.size(); ++i)
    tensors.push_back({.from = at(sources[i]), .to = at(targets.at(i)), .element_bytes = element_bytes.at(i)});
  const CompactBlocks op = {.from = from.view(),
                            .to = to.view(),
                            .rows = rows.data(),
                            .cols = cols.data(),
                            .tensors = tensors.data(),
                            .num_tensors = int64_t(tensors.size())};
  SPARSENET_CHECK(rows.size() == op.to.rows && cols.size() == op.to.cols, "compact_blocks: rows and cols must have ",
                  op.to.rows, " and ", op.to.cols, " entries, got ", rows.size(), " and ", cols.size());
  py::gil_scoped_release release;
  cpu::compact_blocks(op, cpu::usable_threads(threads));
}

// What calls of these sizes would take, without indices or data: [bytes of each Workspace alive at a time].
using WorkspaceSizes = std::array<int64_t, cpu::kWorkspaceDepth>;

template <typename Call> WorkspaceSizes dry_run(const Call& call) {
  const cpu::DryRun run;
  call();
  WorkspaceSizes sizes;
  for (size_t depth = 0; depth < sizes.size(); ++depth) sizes[depth] = run.bytes(int(depth));
  return sizes;
}

WorkspaceSizes linear_workspace(int dtype, int64_t rows, int64_t cols, int block_size, int64_t num_blocks,
                                int64_t batch, int threads) {
  const PatternView pattern = {.rows = rows, .cols = cols, .num_blocks = num_blocks, .block_size = block_size};
  char wanted = 0; // outputs that are asked for have an address
  const LinearForward forward = {.pattern = pattern,
                                 .dtype = DType(dtype),
                                 .x = {.rows = batch, .cols = cols},
                                 .y = {.data = &wanted},
                                 .pre_activation = {}};
  const LinearBackward backward = {.pattern = pattern,
                                   .dtype = DType(dtype),
                                   .grad_y = {.rows = batch, .cols = rows},
                                   .saved = {},
                                   .x = {.rows = batch, .cols = cols},
                                   .grad_x = {.data = &wanted},
                                   .grad_values = &wanted,
                                   .grad_bias = &wanted};
  return dry_run([&] {
    cpu::kernels_for(forward.dtype).linear_forward(forward, cpu::usable_threads(threads));
    cpu::kernels_for(backward.dtype).linear_backward(backward, cpu::usable_threads(threads));
  });
}

WorkspaceSizes norms_workspace(int dtype, int block_size, int64_t in, int64_t out, int64_t batch, int64_t block_rows,
                               int threads) {
  const GradientNorms op = {.dtype = DType(dtype),
                            .block_size = block_size,
                            .x = {.rows = batch, .cols = in},
                            .grad_z = {.rows = batch, .cols = out},
                            .block_row_end = block_rows};
  return dry_run([&] { cpu::kernels_for(op.dtype).gradient_norms(op, cpu::usable_threads(threads)); });
}

py::dict build_info() {
  py::list sets;
  for (const char* const* name = cpu::available_sets(); *name != nullptr; ++name) sets.append(*name);
  py::dict info;
  info["version"] = SPARSENET_VERSION;
  info["isa"] = cpu::active_set();
  info["isa_available"] = sets;
  info["compiler"] = __VERSION__;
#if defined(SPARSENET_CUDA)
  info["cuda_archs"] = SPARSENET_CUDA;
#else
  info["cuda_archs"] = py::none();
#endif
  return info;
}

} // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "sparsenet's kernels; use them through sparsenet.functional";
  py::class_<cpu::Pattern, std::shared_ptr<cpu::Pattern>>(m, "Pattern")
      .def(py::init([](const Indices& crow, const Indices& col, int64_t rows, int64_t cols, int64_t block_size) {
             return std::make_shared<cpu::Pattern>(crow.data(), crow.size(), col.data(), col.size(), rows, cols,
                                                   block_size);
           }),
           py::arg("crow").noconvert(), py::arg("col").noconvert(), py::arg("rows"), py::arg("cols"),
           py::arg("block_size"))
      .def_property_readonly("row", [](const cpu::Pattern& p) { return copy_of(p.view().row, p.view().num_blocks); })
      .def_property_readonly("t_crow",
                             [](const cpu::Pattern& p) { return copy_of(p.view().t_crow, p.view().block_cols() + 1); })
      .def_property_readonly("t_row",
                             [](const cpu::Pattern& p) { return copy_of(p.view().t_row, p.view().num_blocks); })
      .def_property_readonly("t_block",
                             [](const cpu::Pattern& p) { return copy_of(p.view().t_block, p.view().num_blocks); });
  m.def("linear_forward", linear_forward);
  m.def("linear_backward", linear_backward);
  m.def("gradient_norms", gradient_norms);
  m.def("candidate_gradients", candidate_gradients);
  m.def("row_order", [](const Indices& rows, const Indices& cols) {
    return to_numpy(cpu::row_order(rows.data(), cols.data(), rows.size()));
  });
  m.def("select_extreme", [](const py::array_t<float, py::array::c_style>& scores, int64_t k, bool largest) {
    return to_numpy(cpu::select_extreme(scores.data(), scores.size(), k, largest));
  });
  m.def("compact_blocks", compact_blocks);
  m.def("build_info", build_info);
  m.def("linear_workspace", linear_workspace);
  m.def("norms_workspace", norms_workspace);
  m.def("workspace_bytes", cpu::workspace_bytes);
  m.def("trim_workspace", cpu::trim_workspace);
#if defined(SPARSENET_CUDA)
  auto cuda = m.def_submodule("cuda", "the CUDA kernels");
  register_cuda(cuda);
#endif
}
