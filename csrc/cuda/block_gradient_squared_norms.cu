// block_gradient_squared_norms and candidate gradients on CUDA: checks, choice, launch.
#include <utility>

#include "host/choose.h"
#include "block_sparse_linear_grad_weight.cuh"

namespace sparsenet::cuda {

namespace {

constexpr const char* kNorms = "block_gradient_squared_norms";
constexpr const char* kCandidates = "candidate_gradients";

template <typename T>
OuterProduct<T> operands(const Matrix& grad_z, const Matrix& x, int32_t block_size) {
  OuterProduct<T> outer{};
  outer.g = static_cast<const T*>(grad_z.data);
  outer.x = static_cast<const T*>(x.data);
  outer.g_stride = grad_z.stride;
  outer.x_stride = x.stride;
  outer.batch = x.rows;
  outer.n_size = grad_z.cols;
  outer.k_size = x.cols;
  outer.block_size = block_size;
  outer.splits = 1;
  return outer;
}

void check_operands(const char* op, DType dtype, int32_t block_size, const Matrix& grad_z, const Matrix& x) {
  check_dtype(op, dtype);
  check_block_size(op, block_size);
  check_address(op, "x", dtype, x.data);
  check_address(op, "grad_output", dtype, grad_z.data);
  SPARSENET_CHECK(grad_z.rows == x.rows, op, ": grad_output must have as many rows as x, ", x.rows, ", got ",
                  grad_z.rows);
}

void check_norms(const GradientNorms& op) {
  check_operands(kNorms, op.dtype, op.block_size, op.grad_z, op.x);
  const int64_t block_rows = ceil_div(op.grad_z.cols, op.block_size);
  SPARSENET_CHECK(op.block_row_begin >= 0 && op.block_row_begin <= op.block_row_end && op.block_row_end <= block_rows,
                  kNorms, ": block rows must be a range within 0..", block_rows, ", got ", op.block_row_begin, "..",
                  op.block_row_end);
}

// The operands where the kernel reads them: copies with aligned rows where that lets the tensor cores work.
struct Operands {
  Matrix grad_z;
  Matrix x;
  int64_t bytes = 0; // of the copies, at the start of the workspace
};

Operands plan_operands(DType dtype, int32_t block_size, const Matrix& grad_z, const Matrix& x, void* workspace) {
  Operands plan{.grad_z = grad_z, .x = x};
  for (Matrix* matrix : {&plan.grad_z, &plan.x}) {
    if (!worth_aligning(dtype, block_size, *matrix)) continue;
    const Matrix original = *matrix;
    *matrix = aligned_copy(dtype, original, static_cast<char*>(workspace) + plan.bytes);
    plan.bytes += aligned_copy_bytes(dtype, original);
  }
  return plan;
}

void copy_operands(DType dtype, const Matrix& grad_z, const Matrix& x, const Operands& plan, Stream stream) {
  for (const auto& [from, to] : {std::pair{&grad_z, &plan.grad_z}, std::pair{&x, &plan.x}})
    if (from->data != to->data)
      activation_backward({.dtype = dtype, .activation = Activation::none, .grad_y = *from, .saved = {}, .grad_z = *to},
                          stream);
}

void check_workspace(const char* op, const Workspace& workspace, int64_t bytes) {
  SPARSENET_CHECK(workspace.bytes >= bytes, op, ": workspace must have at least ", bytes, " bytes, got ",
                  workspace.bytes);
}

int32_t candidate_splits(const PlaceGradients& op) { return batch_splits(op.num_places, op.block_size, op.x.rows); }

} // namespace

std::string choose_gradient_norms(const GradientNorms& op) {
  check_norms(op);
  const Operands plan = plan_operands(op.dtype, op.block_size, op.grad_z, op.x, nullptr);
  const OuterKernel kernel = choose_outer(op.dtype, op.block_size, plan.grad_z, plan.x);
  return kernel == OuterKernel::sm80 ? name_of(kernel, op.dtype, "gradient_norms")
                                     : "gradient_norms_simt"; // one SIMT kernel for all sizes
}

int64_t gradient_norms_workspace_bytes(const GradientNorms& op) {
  check_norms(op);
  return plan_operands(op.dtype, op.block_size, op.grad_z, op.x, nullptr).bytes;
}

void gradient_norms(const GradientNorms& op, Workspace workspace, Stream stream) {
  check_norms(op);
  const Operands plan = plan_operands(op.dtype, op.block_size, op.grad_z, op.x, workspace.data);
  check_workspace(kNorms, workspace, plan.bytes);
  const OuterKernel kernel = choose_outer(op.dtype, op.block_size, plan.grad_z, plan.x);
  if (op.block_row_begin == op.block_row_end || op.x.cols == 0) return;
  copy_operands(op.dtype, op.grad_z, op.x, plan, stream);
  with_dtype(op.dtype, [&](auto element) {
    using T = decltype(element);
    OuterProduct<T> outer = operands<T>(plan.grad_z, plan.x, op.block_size);
    outer.row_begin = op.block_row_begin;
    outer.row_end = op.block_row_end;
    outer.norms = op.norms;
    if constexpr (sizeof(T) <= 4)
      if (kernel == OuterKernel::sm80) return launch_gradient_norms_sm80<T>(outer, stream);
    launch_gradient_norms_simt<T>(outer, stream);
  });
}

int64_t candidate_gradients_workspace_bytes(const PlaceGradients& op) {
  check_operands(kCandidates, op.dtype, op.block_size, op.grad_z, op.x);
  SPARSENET_CHECK(op.num_places >= 0, kCandidates, ": num_places must not be negative, got ", op.num_places);
  const int64_t copies = plan_operands(op.dtype, op.block_size, op.grad_z, op.x, nullptr).bytes;
  const int32_t splits = candidate_splits(op);
  if (splits == 1) return copies;
  return copies + splits * op.num_places * op.block_size * op.block_size * (op.dtype == DType::float64 ? 8 : 4);
}

void candidate_gradients(const PlaceGradients& op, Workspace workspace, Stream stream) {
  check_workspace(kCandidates, workspace, candidate_gradients_workspace_bytes(op));
  const Operands plan = plan_operands(op.dtype, op.block_size, op.grad_z, op.x, workspace.data);
  const OuterKernel kernel = choose_outer(op.dtype, op.block_size, plan.grad_z, plan.x);
  if (op.num_places == 0) return;
  copy_operands(op.dtype, op.grad_z, op.x, plan, stream);
  with_dtype(op.dtype, [&](auto element) {
    using T = decltype(element);
    OuterProduct<T> outer = operands<T>(plan.grad_z, plan.x, op.block_size);
    outer.place_rows = op.place_rows;
    outer.place_cols = op.place_cols;
    outer.num_places = op.num_places;
    outer.gradients = static_cast<T*>(op.grads);
    outer.splits = candidate_splits(op);
    void* partials = static_cast<char*>(workspace.data) + plan.bytes;
    outer.partials = outer.splits > 1 ? static_cast<Accumulator<T>*>(partials) : nullptr;
    if constexpr (sizeof(T) <= 4)
      if (kernel == OuterKernel::sm80) return launch_grad_weight_sm80<T>(outer, stream);
    launch_grad_weight_simt<T>(outer, stream);
  });
}

} // namespace sparsenet::cuda
