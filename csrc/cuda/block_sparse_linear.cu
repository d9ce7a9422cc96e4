// block_sparse_linear on CUDA: what forward and backward plan, and what they launch.
#include <algorithm>

#include "block_sparse_linear_elementwise_simt.cuh"
#include "block_sparse_linear_grad_weight.cuh"
#include "block_sparse_linear_product.cuh"
#include "host/choose.h"

namespace sparsenet::cuda {

namespace {

// A list made for another grouping is not wrong, only of no use to this kernel: the lines then go in their own order.
bool list_fits(const WorkList& work, ProductKernel kernel, int32_t block_size) {
  const bool uses_lists = kernel == ProductKernel::simt || kernel == ProductKernel::sm80;
  return uses_lists && work.items != nullptr && work.rows_per_group == rows_per_group(kernel, block_size);
}

int64_t partial_bytes(const WorkList& work, ProductKernel kernel, int32_t block_size, int64_t batch, DType dtype) {
  if (!list_fits(work, kernel, block_size)) return 0;
  return work.num_slots * batch * block_size * work.rows_per_group * (dtype == DType::float64 ? 8 : 4);
}

template <typename T, bool kTransposed>
void launch_product(Product<T> product, ProductKernel kernel, const WorkList& work, int64_t lines, void* partials,
                    Stream stream) {
  const int32_t group = rows_per_group(kernel, product.block_size);
  const bool listed = list_fits(work, kernel, product.block_size);
  product.items = listed ? work.items : nullptr;
  product.num_items = listed ? work.num_items : static_cast<int32_t>(ceil_div(lines, group));
  product.partials = static_cast<Accumulator<T>*>(partials);
  if constexpr (sizeof(T) <= 4) {
    if (kernel == ProductKernel::sm80) launch_product_sm80<T, kTransposed>(product, stream);
    if constexpr (!kTransposed)
      if (kernel == ProductKernel::small_batch_sm80) launch_product_small_batch_sm80<T>(product, stream);
  }
  if (kernel == ProductKernel::simt || kernel == ProductKernel::rows_simt)
    launch_product_simt<T, kTransposed>(product, stream);
  if (listed && work.num_slots > 0)
    launch_add_partials(product, static_cast<int64_t>(group) * product.block_size, stream);
}

struct ForwardPlan {
  Operand x;
  ProductKernel kernel = ProductKernel::simt;
  int64_t partial_bytes = 0;
};

ForwardPlan plan_forward(const LinearForward& op, const WorkList& work) {
  const int32_t b = op.pattern.block_size;
  ForwardPlan plan{.x = operand(op.dtype, b, op.x)};
  plan.kernel = choose_product(op.dtype, b, op.x.rows, plan.x.read, op.values, false);
  plan.partial_bytes = partial_bytes(work, plan.kernel, b, op.x.rows, op.dtype);
  return plan;
}

struct BackwardPlan {
  Operand grad_z; // grad_y itself where there is no activation and its rows are aligned
  Operand x;
  ProductKernel grad_input = ProductKernel::simt;
  GradWeightKernel grad_weight = GradWeightKernel::simt;
  int32_t splits = 1;
  int64_t partial_bytes = 0; // grad_x and grad_values use the same place one after the other
};

BackwardPlan plan_backward(const LinearBackward& op, const WorkList& work) {
  const int32_t b = op.pattern.block_size;
  const int64_t batch = op.grad_y.rows;
  const bool multiplied = op.grad_x.data != nullptr || op.grad_values != nullptr;
  BackwardPlan plan{.grad_z = {op.grad_y, op.grad_y, 0}, .x = {op.x, op.x, 0}};
  if (op.activation != Activation::none)
    plan.grad_z = aligned_copy(op.dtype, op.grad_y);
  else if (multiplied)
    plan.grad_z = operand(op.dtype, b, op.grad_y);
  if (op.grad_x.data != nullptr) {
    plan.grad_input = choose_product(op.dtype, b, batch, plan.grad_z.read, op.values, true);
    plan.partial_bytes = partial_bytes(work, plan.grad_input, b, batch, op.dtype);
  }
  if (op.grad_values != nullptr) {
    plan.x = operand(op.dtype, b, op.x);
    plan.grad_weight = choose_grad_weight(op.dtype, b, plan.grad_z.read, plan.x.read);
    plan.splits = batch_splits(op.pattern.num_blocks, b, batch);
    plan.partial_bytes = std::max(plan.partial_bytes, split_bytes(plan.splits, op.pattern.num_blocks, b, op.dtype));
  }
  return plan;
}

template <typename T>
void launch_grad_z(const LinearBackward& op, const Matrix& grad_z, Stream stream) {
  launch_activation_gradient<T>({.grad_y = static_cast<const T*>(op.grad_y.data),
                                 .saved = static_cast<const T*>(op.saved.data),
                                 .grad_z = static_cast<T*>(grad_z.data),
                                 .batch = grad_z.rows,
                                 .n_size = grad_z.cols,
                                 .grad_y_stride = op.grad_y.stride,
                                 .saved_stride = op.saved.stride,
                                 .grad_z_stride = grad_z.stride,
                                 .activation = op.activation},
                                stream);
}

template <typename T>
void launch_grad_bias(const LinearBackward& op, const Matrix& grad_z, Stream stream) {
  launch_column_sums<T>({.matrix = static_cast<const T*>(grad_z.data),
                         .sums = static_cast<T*>(op.grad_bias),
                         .batch = grad_z.rows,
                         .n_size = grad_z.cols,
                         .stride = grad_z.stride},
                        stream);
}

template <typename T>
void launch_grad_input(const LinearBackward& op, const BackwardPlan& plan, const WorkList& work, void* partials,
                       Stream stream) {
  const PatternView& pattern = op.pattern;
  const Matrix& grad_z = plan.grad_z.read;
  Product<T> product{};
  product.pointers = pattern.t_crow;
  product.indices = pattern.t_row;
  product.blocks = pattern.t_block;
  product.block_size = pattern.block_size;
  product.batch = grad_z.rows;
  product.k_size = pattern.rows;
  product.n_size = pattern.cols;
  product.a = static_cast<const T*>(grad_z.data);
  product.a_stride = grad_z.stride;
  product.values = static_cast<const T*>(op.values);
  product.y = static_cast<T*>(op.grad_x.data);
  product.y_stride = op.grad_x.stride;
  launch_product<T, true>(product, plan.grad_input, work, pattern.block_cols(), partials, stream);
}

} // namespace

std::string choose_linear_forward(const LinearForward& op) {
  check_linear_forward(op);
  return name_of(plan_forward(op, {}).kernel, op.dtype, false);
}

BackwardNames choose_linear_backward(const LinearBackward& op) {
  check_linear_backward(op);
  const BackwardPlan plan = plan_backward(op, {});
  return {name_of(plan.grad_input, op.dtype, true), name_of(plan.grad_weight, op.dtype)};
}

void linear_forward(const LinearForward& op, const WorkList& work, const Run& run) {
  check_linear_forward(op);
  ForwardPlan plan = plan_forward(op, work);
  const PatternView& pattern = op.pattern;
  if (op.x.rows == 0 || pattern.rows == 0) return;
  auto* scratch = static_cast<char*>(run.scratch(plan.x.copy_bytes + plan.partial_bytes));
  plan.x.place(scratch);
  plan.x.copy(op.dtype, run.stream);
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
    product.a = static_cast<const T*>(plan.x.read.data);
    product.a_stride = plan.x.read.stride;
    product.values = static_cast<const T*>(op.values);
    product.bias = static_cast<const T*>(op.bias);
    product.y = static_cast<T*>(op.y.data);
    product.y_stride = op.y.stride;
    product.pre_activation = static_cast<T*>(op.pre_activation.data);
    product.pre_activation_stride = op.pre_activation.stride;
    launch_product<T, false>(product, plan.kernel, work, pattern.block_rows(), scratch, run.stream);
  });
}

void linear_backward(const LinearBackward& op, const WorkList& work, const Run& run) {
  check_linear_backward(op);
  BackwardPlan plan = plan_backward(op, work);
  const PatternView& pattern = op.pattern;
  auto* scratch = static_cast<char*>(run.scratch(plan.grad_z.copy_bytes + plan.x.copy_bytes + plan.partial_bytes));
  plan.grad_z.place(scratch);
  plan.x.place(scratch);
  plan.x.copy(op.dtype, run.stream);
  with_dtype(op.dtype, [&](auto element) {
    using T = decltype(element);
    const Matrix& grad_z = plan.grad_z.read;
    if (plan.grad_z.copy_bytes > 0) launch_grad_z<T>(op, grad_z, run.stream);
    if (op.grad_bias != nullptr) launch_grad_bias<T>(op, grad_z, run.stream);
    if (op.grad_x.data != nullptr && grad_z.rows > 0 && pattern.cols > 0)
      launch_grad_input<T>(op, plan, work, scratch, run.stream);
    if (op.grad_values != nullptr && pattern.num_blocks > 0)
      launch_grad_weight<T>({gradient_operands<T>(grad_z, plan.x.read, pattern.block_size), pattern.row, pattern.col,
                             pattern.num_blocks, static_cast<T*>(op.grad_values),
                             plan.splits > 1 ? reinterpret_cast<Accumulator<T>*>(scratch) : nullptr, plan.splits},
                            plan.grad_weight, run.stream);
  });
}

void copy_rows(DType dtype, const Matrix& from, const Matrix& to, Stream stream) {
  LinearBackward copy; // without an activation grad_z is grad_y
  copy.grad_y = from;
  with_dtype(dtype, [&](auto element) { launch_grad_z<decltype(element)>(copy, to, stream); });
}

} // namespace sparsenet::cuda
