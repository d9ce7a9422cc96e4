// block_gradient_squared_norms and candidate gradients on CUDA: what each plans, and what it launches.
#include "block_gradient_squared_norms.cuh"

#include "host/choose.h"

namespace sparsenet::cuda {

void gradient_norms(const GradientNorms& op, const Run& run) {
  check_gradient_norms(op);
  Operand grad_z = operand(op.dtype, op.block_size, op.grad_z), x = operand(op.dtype, op.block_size, op.x);
  const GradWeightKernel kernel = choose_grad_weight(op.dtype, op.block_size, grad_z.read, x.read);
  if (op.block_row_begin == op.block_row_end || op.x.cols == 0) return;
  auto* scratch = static_cast<char*>(run.scratch(grad_z.copy_bytes + x.copy_bytes));
  grad_z.place(scratch);
  x.place(scratch);
  grad_z.copy(op.dtype, run.stream);
  x.copy(op.dtype, run.stream);
  with_dtype(op.dtype, [&](auto element) {
    using T = decltype(element);
    const GradientNormsParams<T> params{gradient_operands<T>(grad_z.read, x.read, op.block_size), op.block_row_begin,
                                        op.block_row_end, op.norms};
    if constexpr (sizeof(T) <= 4)
      if (kernel == GradWeightKernel::sm80) return launch_gradient_norms_sm80<T>(params, run.stream);
    launch_gradient_norms_simt<T>(params, run.stream);
  });
}

void candidate_gradients(const PlaceGradients& op, const Run& run) {
  constexpr const char* kOp = "candidate_gradients";
  check_gradient_operands(kOp, op.dtype, op.block_size, op.x, op.grad_z);
  SPARSENET_CHECK(op.num_places >= 0, kOp, ": num_places must not be negative, got ", op.num_places);
  Operand grad_z = operand(op.dtype, op.block_size, op.grad_z), x = operand(op.dtype, op.block_size, op.x);
  const GradWeightKernel kernel = choose_grad_weight(op.dtype, op.block_size, grad_z.read, x.read);
  const int32_t splits = batch_splits(op.num_places, op.block_size, op.x.rows);
  if (op.num_places == 0) return;
  auto* scratch = static_cast<char*>(
      run.scratch(grad_z.copy_bytes + x.copy_bytes + split_bytes(splits, op.num_places, op.block_size, op.dtype)));
  grad_z.place(scratch);
  x.place(scratch);
  grad_z.copy(op.dtype, run.stream);
  x.copy(op.dtype, run.stream);
  with_dtype(op.dtype, [&](auto element) {
    using T = decltype(element);
    launch_grad_weight<T>({gradient_operands<T>(grad_z.read, x.read, op.block_size), op.place_rows, op.place_cols,
                           op.num_places, static_cast<T*>(op.grads),
                           splits > 1 ? reinterpret_cast<Accumulator<T>*>(scratch) : nullptr, splits},
                          kernel, run.stream);
  });
}

} // namespace sparsenet::cuda
