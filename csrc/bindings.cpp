// PYBIND11_MODULE(_C): the complete list of what Python can call. Tensors arrive as addresses and sizes (boundary.h),
// checked by sparsenet/functional/checks.py; index arrays arrive as numpy arrays and are checked here. Kernels run
// without the GIL.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "boundary.h"
#include "cpu/block_pattern.h"
#include "cpu/compact_blocks.h"
#include "cpu/isa.h"
#include "cpu/threads.h"
#include "cpu/workspace.h"
#include "checks.h"
#include "types.h"
#if defined(SPARSENET_CUDA)
  #include "cuda/host/bindings.h"
#endif

namespace py = pybind11;
using namespace sparsenet;

namespace {

using Indices = py::array_t<int32_t, py::array::c_style>;
using Places = py::array_t<int64_t, py::array::c_style>;
using Address = uintptr_t;

// For results, which torch allocated in one piece and this call writes whole.
void use_huge_pages(const Matrix& m, DType dtype) {
  cpu::use_huge_pages(m.data, m.rows * m.cols * element_bytes(dtype));
}

template <typename T> py::array_t<T> to_numpy(const std::vector<T>& v) {
  return py::array_t<T>(static_cast<py::ssize_t>(v.size()), v.data());
}

py::array_t<int32_t> copy_of(const int32_t* data, int64_t count) { return py::array_t<int32_t>(count, data); }

void linear_forward(const cpu::Pattern& pattern, const LinearCall& call, const Matrix& x, const Weight& weight,
                    const Outputs& outputs) {
  const LinearForward op = linear_forward_op(pattern.view(), call, x, weight, outputs);
  py::gil_scoped_release release;
  use_huge_pages(op.y, op.dtype);
  use_huge_pages(op.pre_activation, op.dtype);
  cpu::kernels_for(op.dtype).linear_forward(op, cpu::usable_threads(call.threads));
}

void linear_backward(const cpu::Pattern& pattern, const LinearCall& call, const Matrix& x, Address values,
                     const Upstream& upstream, const Gradients& grads) {
  const PatternView& p = pattern.view();
  const LinearBackward op = linear_backward_op(p, call, x, at(values), upstream, grads);
  py::gil_scoped_release release;
  use_huge_pages(op.grad_x, op.dtype);
  cpu::use_huge_pages(op.grad_values, p.num_blocks * p.block_size * p.block_size * element_bytes(op.dtype));
  cpu::kernels_for(op.dtype).linear_backward(op, cpu::usable_threads(call.threads));
}

void gradient_norms(const GradientCall& call, const Matrix& x, const Matrix& grad_z, const Interval& block_rows,
                    Address norms) {
  const GradientNorms op = gradient_norms_op(call, x, grad_z, block_rows, at(norms));
  py::gil_scoped_release release;
  cpu::kernels_for(op.dtype).gradient_norms(op, cpu::usable_threads(call.threads));
}

void candidate_gradients(const GradientCall& call, const Matrix& x, const Matrix& grad_z,
                         const std::pair<Indices, Indices>& places, Address grads) {
  const auto& [rows, cols] = places;
  const int64_t block_rows = (grad_z.cols + call.block_size - 1) / call.block_size;
  const cpu::PlacesByRow sorted(rows.data(), cols.data(), rows.size(), block_rows);
  const CandidateGradients op = {.dtype = call.dtype,
                                 .block_size = call.block_size,
                                 .x = x,
                                 .grad_z = grad_z,
                                 .crow = sorted.crow.data(),
                                 .col = sorted.col.data(),
                                 .block = sorted.number.data(),
                                 .num_places = rows.size(),
                                 .grads = at(grads)};
  py::gil_scoped_release release;
  cpu::kernels_for(op.dtype).candidate_gradients(op, cpu::usable_threads(call.threads));
}

std::pair<Indices, Indices> csr_from_places(const Places& places, int64_t block_rows, int64_t block_cols) {
  Indices crow(block_rows + 1), col(places.size());
  const int64_t *from = places.data(), count = places.size();
  int32_t *to_crow = crow.mutable_data(), *to_col = col.mutable_data();
  {
    py::gil_scoped_release release;
    cpu::csr_from_places(from, count, block_rows, block_cols, to_crow, to_col);
  }
  return {crow, col};
}

Places draw_free_places(const Places& active, int64_t places, int64_t count, uint64_t key) {
  const int64_t free = places - active.size();
  SPARSENET_CHECK(count >= 0 && count <= free, "draw_free_places: count must lie in [0, ", free, "], got ", count);
  Places drawn(count);
  const int64_t* from = active.data();
  int64_t* to = drawn.mutable_data();
  py::gil_scoped_release release;
  cpu::draw_free_places(from, active.size(), places, key, count, to);
  return drawn;
}

py::array lowest_to_spare(const py::array_t<float, py::array::c_style>& scores, int64_t k,
                          const std::vector<Places>& lines) {
  std::vector<const int64_t*> of_block;
  for (const Places& line : lines) {
    SPARSENET_CHECK(line.size() == scores.size(), "lowest_to_spare: lines must have one entry per score, ",
                    scores.size(), ", got ", line.size());
    of_block.push_back(line.data());
  }
  return to_numpy(cpu::lowest_to_spare(scores.data(), scores.size(), k, of_block));
}

Places carried_blocks(const cpu::Pattern& from, const cpu::Pattern& to) {
  Places number(to.view().num_blocks);
  cpu::carried_blocks(from.view(), to.view(), number.mutable_data());
  return number;
}

Places linear_places(const cpu::Pattern& pattern) {
  Places places(pattern.view().num_blocks);
  cpu::linear_places(pattern.view(), places.mutable_data());
  return places;
}

void compact_blocks(const cpu::Pattern& from, const cpu::Pattern& to, const std::pair<Indices, Indices>& gathered,
                    const std::vector<GatheredBlocks>& tensors, int threads) {
  const auto& [rows, cols] = gathered;
  const CompactBlocks op = {.from = from.view(),
                            .to = to.view(),
                            .rows = rows.data(),
                            .cols = cols.data(),
                            .tensors = tensors.data(),
                            .num_tensors = int64_t(tensors.size())};
  check_gathered_sizes(op, rows.size(), cols.size());
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

// Of forward and backward with every output, of a layer [out, in] of so many blocks and an x that has only sizes.
WorkspaceSizes linear_workspace(const LinearCall& call, const Matrix& x, int64_t out, int64_t num_blocks,
                                int block_size) {
  const PatternView pattern = {.rows = out, .cols = x.cols, .num_blocks = num_blocks, .block_size = block_size};
  char wanted = 0; // outputs that are asked for have an address
  const LinearForward forward = linear_forward_op(pattern, call, x, {}, {.y = &wanted});
  const LinearBackward backward = linear_backward_op(pattern, call, x, nullptr, {.grad_y = {nullptr, x.rows, out, out}},
                                                     {&wanted, &wanted, &wanted});
  return dry_run([&] {
    cpu::kernels_for(call.dtype).linear_forward(forward, cpu::usable_threads(call.threads));
    cpu::kernels_for(call.dtype).linear_backward(backward, cpu::usable_threads(call.threads));
  });
}

WorkspaceSizes norms_workspace(const GradientCall& call, const Matrix& x, const Matrix& grad_z,
                               const Interval& block_rows) {
  const GradientNorms op = gradient_norms_op(call, x, grad_z, block_rows, nullptr);
  return dry_run([&] { cpu::kernels_for(op.dtype).gradient_norms(op, cpu::usable_threads(call.threads)); });
}

py::dict build_info() {
  py::list sets;
  for (const char* const* name = cpu::available_sets(); *name != nullptr; ++name) sets.append(*name);
  py::dict info;
  info["version"] = SPARSENET_VERSION;
#if defined(SPARSENET_SOURCES)
  info["sources"] = SPARSENET_SOURCES; // a digest of them
#else
  info["sources"] = "";
#endif
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
      .def_property_readonly("places", linear_places)
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
  m.def("csr_from_places", csr_from_places);
  m.def("draw_free_places", draw_free_places);
  m.def("carried_blocks", carried_blocks);
  m.def("lowest_to_spare", lowest_to_spare);
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
