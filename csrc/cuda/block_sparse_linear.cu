// block_sparse_linear on CUDA: checks the arguments, chooses the kernels, lays out the workspace, launches.
#include <algorithm>

#include "block_sparse_linear_elementwise_simt.cuh"
#include "block_sparse_linear_product.cuh"
#include "host/choose.h"
#include "block_sparse_linear_grad_weight.cuh"

namespace sparsenet::cuda {

namespace {

constexpr const char* kOp = "block_sparse_linear";

int64_t accumulator_bytes(DType dtype) { return dtype == DType::float64 ? 8 : 4; }

void check_matrix(const char* name, DType dtype, const Matrix& matrix, int64_t rows, int64_t cols) {
  check_address(kOp, name, dtype, matrix.data);
  SPARSENET_CHECK(matrix.rows == rows && matrix.cols == cols, kOp, ": ", name, " must have shape [", rows, ", ", cols,
                  "], got [", matrix.rows, ", ", matrix.cols, "]");
}

// Rows of an input may lie anywhere, on each other too (an expanded tensor); those of an output may not overlap.
void check_output(const char* name, DType dtype, const Matrix& matrix, int64_t rows, int64_t cols) {
  check_matrix(name, dtype, matrix, rows, cols);
  SPARSENET_CHECK(matrix.stride >= cols || rows <= 1, kOp, ": ", name, " must have a row stride of at least ", cols,
                  ", got ", matrix.stride);
}

void check_pattern(const PatternView& pattern) {
  check_block_size(kOp, pattern.block_size);
  SPARSENET_CHECK(pattern.rows >= 0 && pattern.cols >= 0, kOp, ": shape must not be negative, got [", pattern.rows,
                  ", ", pattern.cols, "]");
  SPARSENET_CHECK(pattern.num_blocks >= 0 && pattern.num_blocks <= 2147483647, kOp,
                  ": num_blocks must be in 0..2147483647, got ", pattern.num_blocks);
}

void check_activation(Activation activation) {
  SPARSENET_CHECK(activation >= Activation::none && activation <= Activation::silu, kOp,
                  ": activation must be none, relu, gelu or silu, got code ", static_cast<int32_t>(activation));
}

void check_workspace(const char* op, const Workspace& workspace, int64_t bytes) {
  SPARSENET_CHECK(workspace.bytes >= bytes && (bytes == 0 || workspace.data != nullptr), op,
                  ": workspace must have at least ", bytes, " bytes, got ", workspace.bytes);
}

// A list made for another grouping is not wrong, only of no use to this kernel: the lines then go in their own order.
bool list_fits(const WorkList& work, ProductKernel kernel, int32_t block_size) {
  const bool uses_lists = kernel == ProductKernel::simt || kernel == ProductKernel::sm80;
  return uses_lists && work.items != nullptr && work.rows_per_group == rows_per_group(kernel, block_size);
}

int64_t partial_bytes(const WorkList& work, ProductKernel kernel, int32_t block_size, int64_t batch, DType dtype) {
  if (!list_fits(work, kernel, block_size)) return 0;
  return work.num_slots * batch * block_size * work.rows_per_group * accumulator_bytes(dtype);
}

template <typename T, bool kTransposed>
void run_product(Product<T> product, ProductKernel kernel, const WorkList& work, int64_t lines, void* partials,
                 Stream stream) {
  const int32_t group = rows_per_group(kernel, product.block_size);
  const bool listed = list_fits(work, kernel, product.block_size);
  product.items = listed ? work.items : nullptr;
  product.num_items = listed ? work.num_items : static_cast<int32_t>(ceil_div(lines, group));
  product.partials = static_cast<Accumulator<T>*>(partials);
  if constexpr (sizeof(T) <= 4) {
    if (kernel == ProductKernel::sm80) launch_product_sm80<T, kTransposed>(product, stream);
    if constexpr (!kTransposed)
      if (kernel == ProductKernel::small_sm80) launch_product_small_sm80<T>(product, stream);
  }
  if (kernel == ProductKernel::simt || kernel == ProductKernel::rows_simt)
    launch_product_simt<T, kTransposed>(product, stream);
  if (listed && work.num_slots > 0)
    launch_add_partials(product, static_cast<int64_t>(group) * product.block_size, stream);
}

void check_forward(const LinearForward& op) {
  check_pattern(op.pattern);
  check_dtype(kOp, op.dtype);
  check_activation(op.activation);
  check_matrix("x", op.dtype, op.x, op.x.rows, op.pattern.cols);
  check_output("y", op.dtype, op.y, op.x.rows, op.pattern.rows);
  check_address(kOp, "values", op.dtype, op.values);
  check_address(kOp, "bias", op.dtype, op.bias);
  if (op.pre_activation.data != nullptr)
    check_output("pre_activation", op.dtype, op.pre_activation, op.x.rows, op.pattern.rows);
}

// Forward: x where the kernel reads it, and what lies in the workspace.
struct ForwardPlan {
  Matrix x;
  ProductKernel kernel = ProductKernel::simt;
  int64_t copy_bytes = 0; // of an aligned x
  int64_t partial_bytes = 0;
  int64_t bytes() const { return copy_bytes + partial_bytes; }
};

ForwardPlan plan_forward(const LinearForward& op, const WorkList& work, void* workspace) {
  ForwardPlan plan{.x = op.x};
  if (worth_aligning(op.dtype, op.pattern.block_size, op.x)) {
    plan.x = aligned_copy(op.dtype, op.x, workspace);
    plan.copy_bytes = aligned_copy_bytes(op.dtype, op.x);
  }
  plan.kernel = choose_product(op.dtype, op.pattern.block_size, op.x.rows, plan.x, op.values, false);
  plan.partial_bytes = partial_bytes(work, plan.kernel, op.pattern.block_size, op.x.rows, op.dtype);
  return plan;
}

void copy_rows(DType dtype, const Matrix& from, const Matrix& to, Stream stream) {
  activation_backward({.dtype = dtype, .activation = Activation::none, .grad_y = from, .saved = {}, .grad_z = to},
                      stream);
}

// Backward: what is computed from what, and where it lies in the workspace.
struct BackwardPlan {
  Matrix grad_z; // grad_y itself where there is no activation and its rows are aligned
  Matrix x;
  ProductKernel product = ProductKernel::simt;
  OuterKernel outer = OuterKernel::simt;
  int32_t splits = 1;
  int64_t grad_z_bytes = 0;
  int64_t x_bytes = 0;
  int64_t partial_bytes = 0; // grad_x and grad_values use the same place one after the other
  int64_t bytes() const { return grad_z_bytes + x_bytes + partial_bytes; }
};

BackwardPlan plan_backward(const LinearBackward& op, const WorkList& work, void* workspace) {
  BackwardPlan plan;
  plan.grad_z = op.grad_y;
  plan.x = op.x;
  const int32_t b = op.pattern.block_size;
  const bool multiplied = op.grad_x.data != nullptr || op.grad_values != nullptr;
  if (op.activation != Activation::none || (multiplied && worth_aligning(op.dtype, b, op.grad_y))) {
    plan.grad_z = aligned_copy(op.dtype, op.grad_y, workspace);
    plan.grad_z_bytes = aligned_copy_bytes(op.dtype, op.grad_y);
  }
  if (op.grad_values != nullptr && worth_aligning(op.dtype, b, op.x)) {
    plan.x = aligned_copy(op.dtype, op.x, static_cast<char*>(workspace) + plan.grad_z_bytes);
    plan.x_bytes = aligned_copy_bytes(op.dtype, op.x);
  }
  if (op.grad_x.data != nullptr) {
    plan.product = choose_product(op.dtype, b, op.grad_y.rows, plan.grad_z, op.values, true);
    plan.partial_bytes = partial_bytes(work, plan.product, b, op.grad_y.rows, op.dtype);
  }
  if (op.grad_values != nullptr) {
    plan.outer = choose_outer(op.dtype, b, plan.grad_z, plan.x);
    plan.splits = batch_splits(op.pattern.num_blocks, b, op.grad_y.rows);
    if (plan.splits > 1)
      plan.partial_bytes =
          std::max(plan.partial_bytes, plan.splits * op.pattern.num_blocks * b * b * accumulator_bytes(op.dtype));
  }
  return plan;
}

void check_backward(const LinearBackward& op) {
  check_pattern(op.pattern);
  check_dtype(kOp, op.dtype);
  check_activation(op.activation);
  check_matrix("grad_y", op.dtype, op.grad_y, op.grad_y.rows, op.pattern.rows);
  if (op.activation != Activation::none && op.grad_y.rows > 0)
    SPARSENET_CHECK(op.saved.data != nullptr || op.pattern.rows == 0, kOp,
                    ": saved must be given where there is an activation, got null");
  if (op.activation != Activation::none) check_matrix("saved", op.dtype, op.saved, op.grad_y.rows, op.pattern.rows);
  check_address(kOp, "values", op.dtype, op.values);
  if (op.grad_x.data != nullptr) check_output("grad_x", op.dtype, op.grad_x, op.grad_y.rows, op.pattern.cols);
  if (op.grad_values != nullptr) check_matrix("x", op.dtype, op.x, op.grad_y.rows, op.pattern.cols);
}

} // namespace

std::string choose_linear_forward(const LinearForward& op) {
  check_forward(op);
  return name_of(plan_forward(op, {}, nullptr).kernel, op.dtype, false);
}
std::string choose_grad_input(const LinearBackward& op) {
  check_backward(op);
  return name_of(plan_backward(op, {}, nullptr).product, op.dtype, true);
}
std::string choose_grad_weight(const LinearBackward& op) {
  check_backward(op);
  return name_of(plan_backward(op, {}, nullptr).outer, op.dtype, "grad_weight");
}

int64_t linear_forward_workspace_bytes(const LinearForward& op, const WorkList& work) {
  check_forward(op);
  return plan_forward(op, work, nullptr).bytes();
}

void linear_forward(const LinearForward& op, const WorkList& work, Workspace workspace, Stream stream) {
  check_forward(op);
  const ForwardPlan plan = plan_forward(op, work, workspace.data);
  const PatternView& pattern = op.pattern;
  check_workspace(kOp, workspace, plan.bytes());
  if (op.x.rows == 0 || pattern.rows == 0) return;
  if (plan.copy_bytes > 0) copy_rows(op.dtype, op.x, plan.x, stream);
  void* partials = static_cast<char*>(workspace.data) + plan.copy_bytes;
  with_dtype(op.dtype, [&](auto element) {
    using T = decltype(element);
    Product<T> product{};
    product.pointers = pattern.crow;
    product.indices = pattern.col;
    product.block_size = pattern.block_size;
    product.activation = op.activation;
    product.batch = op.x.rows;
    product.k_size = pattern.cols;
    product.n_size = pattern.rows;
    product.a = static_cast<const T*>(plan.x.data);
    product.a_stride = plan.x.stride;
    product.values = static_cast<const T*>(op.values);
    product.bias = static_cast<const T*>(op.bias);
    product.y = static_cast<T*>(op.y.data);
    product.y_stride = op.y.stride;
    product.pre_activation = static_cast<T*>(op.pre_activation.data);
    product.pre_activation_stride = op.pre_activation.stride;
    run_product<T, false>(product, plan.kernel, work, pattern.block_rows(), partials, stream);
  });
}

int64_t linear_backward_workspace_bytes(const LinearBackward& op, const WorkList& work) {
  check_backward(op);
  return plan_backward(op, work, nullptr).bytes();
}

void linear_backward(const LinearBackward& op, const WorkList& work, Workspace workspace, Stream stream) {
  check_backward(op);
  const BackwardPlan plan = plan_backward(op, work, workspace.data);
  check_workspace(kOp, workspace, plan.bytes());
  const PatternView& pattern = op.pattern;
  void* partials = static_cast<char*>(workspace.data) + plan.grad_z_bytes + plan.x_bytes;
  if (plan.x_bytes > 0) copy_rows(op.dtype, op.x, plan.x, stream);
  if (plan.grad_z_bytes > 0)
    activation_backward(
        {.dtype = op.dtype, .activation = op.activation, .grad_y = op.grad_y, .saved = op.saved, .grad_z = plan.grad_z},
        stream);
  with_dtype(op.dtype, [&](auto element) {
    using T = decltype(element);
    const auto* grad_z = static_cast<const T*>(plan.grad_z.data);
    if (op.grad_bias != nullptr)
      launch_column_sums<T>({.matrix = grad_z,
                             .sums = static_cast<T*>(op.grad_bias),
                             .batch = op.grad_y.rows,
                             .n_size = pattern.rows,
                             .stride = plan.grad_z.stride},
                            stream);
    if (op.grad_x.data != nullptr && op.grad_y.rows > 0 && pattern.cols > 0) {
      Product<T> product{};
      product.pointers = pattern.t_crow;
      product.indices = pattern.t_row;
      product.blocks = pattern.t_block;
      product.block_size = pattern.block_size;
      product.batch = op.grad_y.rows;
      product.k_size = pattern.rows;
      product.n_size = pattern.cols;
      product.a = grad_z;
      product.a_stride = plan.grad_z.stride;
      product.values = static_cast<const T*>(op.values);
      product.y = static_cast<T*>(op.grad_x.data);
      product.y_stride = op.grad_x.stride;
      run_product<T, true>(product, plan.product, work, pattern.block_cols(), partials, stream);
    }
    if (op.grad_values != nullptr && pattern.num_blocks > 0) {
      OuterProduct<T> outer{};
      outer.g = grad_z;
      outer.x = static_cast<const T*>(plan.x.data);
      outer.g_stride = plan.grad_z.stride;
      outer.x_stride = plan.x.stride;
      outer.batch = op.grad_y.rows;
      outer.n_size = pattern.rows;
      outer.k_size = pattern.cols;
      outer.block_size = pattern.block_size;
      outer.place_rows = pattern.row;
      outer.place_cols = pattern.col;
      outer.num_places = pattern.num_blocks;
      outer.gradients = static_cast<T*>(op.grad_values);
      outer.splits = plan.splits;
      outer.partials = plan.splits > 1 ? static_cast<Accumulator<T>*>(partials) : nullptr;
      if constexpr (sizeof(T) <= 4)
        if (plan.outer == OuterKernel::sm80) return launch_grad_weight_sm80<T>(outer, stream);
      launch_grad_weight_simt<T>(outer, stream);
    }
  });
}

void activation_backward(const ActivationBackward& op, Stream stream) {
  check_dtype("activation_backward", op.dtype);
  check_activation(op.activation);
  with_dtype(op.dtype, [&](auto element) {
    using T = decltype(element);
    launch_activation_gradient<T>({.grad_y = static_cast<const T*>(op.grad_y.data),
                                   .saved = static_cast<const T*>(op.saved.data),
                                   .grad_z = static_cast<T*>(op.grad_z.data),
                                   .batch = op.grad_y.rows,
                                   .n_size = op.grad_y.cols,
                                   .grad_y_stride = op.grad_y.stride,
                                   .saved_stride = op.saved.stride,
                                   .grad_z_stride = op.grad_z.stride,
                                   .activation = op.activation},
                                  stream);
  });
}

} // namespace sparsenet::cuda
