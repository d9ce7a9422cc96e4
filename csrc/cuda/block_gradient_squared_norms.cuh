// What the kernels of block_gradient_squared_norms share: their parameters.
#pragma once

#include "block_sparse_linear_grad_weight.cuh"

namespace sparsenet::cuda {

template <typename T>
struct GradientNormsParams : GradientOperands<T> {
  int64_t row_begin; // in blocks
  int64_t row_end;
  float* norms; // [row_end - row_begin, ceil(k_size / b)]
};

// The variants, each instantiated in the .cu file of its name.
template <typename T>
void launch_gradient_norms_simt(const GradientNormsParams<T>& p, Stream stream);
template <typename T>
void launch_gradient_norms_sm80(const GradientNormsParams<T>& p, Stream stream);

} // namespace sparsenet::cuda
