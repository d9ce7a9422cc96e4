// The two element-wise steps of backward, on any architecture.
//
//   grad_z[m, n] = grad_y[m, n] activation'(saved[m, n])       3 elements moved per element
//   grad_bias[n] = sum_m grad_z[m, n]                          1 element read per element
//
// grad_z: a CTA takes kThreads columns of kRows rows, a thread one column; without an activation it is a copy, to rows
// that start on 16-byte boundaries.
// grad_bias: a CTA takes 32 columns; its 8 warps read every eighth row, coalesced along n, and their eight partial sums
// are added in warp order, so the bits do not depend on scheduling.
#pragma once

#include "device/activation.cuh"
#include "device/elements.cuh"
#include "host/launch.h"

namespace sparsenet::cuda {

template <typename T>
struct ActivationGradient {
  const T* grad_y;
  const T* saved;
  T* grad_z;
  int64_t batch;
  int64_t n_size;
  int64_t grad_y_stride;
  int64_t saved_stride;
  int64_t grad_z_stride;
  Activation activation;
};

struct RowsConfig {
  static constexpr int kThreads = 256;
  static constexpr int kRows = 8;
};

template <typename T>
SPARSENET_KERNEL(RowsConfig::kThreads)
activation_gradient_kernel(const ActivationGradient<T> p) {
  const auto cta = static_cast<uint32_t>(block_index());
  const auto column_tiles = static_cast<uint32_t>(ceil_div(p.n_size, RowsConfig::kThreads));
  const int64_t n = static_cast<int64_t>(cta % column_tiles) * RowsConfig::kThreads + thread_index();
  const int64_t m0 = static_cast<int64_t>(cta / column_tiles) * RowsConfig::kRows;
  if (n >= p.n_size) return;
  SPARSENET_UNROLL
  for (int i = 0; i < RowsConfig::kRows; ++i) {
    const int64_t m = m0 + i;
    if (m >= p.batch) return;
    const T grad_y = load_global(p.grad_y + m * p.grad_y_stride + n);
    T grad_z = grad_y; // as it is, NaN's bits too
    if (p.activation != Activation::none)
      grad_z = from_accumulator<T>(activation_gradient(
          to_accumulator(grad_y), to_accumulator(load_global(p.saved + m * p.saved_stride + n)), p.activation));
    store_global(p.grad_z + m * p.grad_z_stride + n, grad_z);
  }
}

template <typename T>
struct ColumnSums {
  const T* matrix;
  T* sums;
  int64_t batch;
  int64_t n_size;
  int64_t stride;
};

struct ColumnSumsConfig {
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / 32;
};

template <typename T>
SPARSENET_KERNEL(ColumnSumsConfig::kThreads)
column_sums_kernel(const ColumnSums<T> p) {
  using A = Accumulator<T>;
  const Shared<A> partial = shared_array<A>(0); // [kWarps][32]
  const int64_t n = block_index() * 32 + lane_index();
  A sum = 0;
  if (n < p.n_size)
    for (int64_t m = warp_index(); m < p.batch; m += ColumnSumsConfig::kWarps)
      sum += to_accumulator(load_global(p.matrix + m * p.stride + n));
  partial[thread_index()] = sum;
  sync_block();
  if (warp_index() != 0 || n >= p.n_size) return;
  A total = 0;
  for (int warp = 0; warp < ColumnSumsConfig::kWarps; ++warp) total += partial[warp * 32 + lane_index()];
  store_global(p.sums + n, from_accumulator<T>(total));
}

template <typename T>
void launch_activation_gradient(const ActivationGradient<T>& p, Stream stream) {
  launch(p.activation == Activation::none ? "copy_rows" : "activation_gradient", activation_gradient_kernel<T>,
         {.ctas = ceil_div(p.n_size, RowsConfig::kThreads) * ceil_div(p.batch, RowsConfig::kRows),
          .threads = RowsConfig::kThreads},
         stream, p);
}

template <typename T>
void launch_column_sums(const ColumnSums<T>& p, Stream stream) {
  launch("column_sums", column_sums_kernel<T>,
         {.ctas = ceil_div(p.n_size, 32),
          .threads = ColumnSumsConfig::kThreads,
          .shared_bytes = static_cast<int64_t>(sizeof(Accumulator<T>)) * ColumnSumsConfig::kThreads},
         stream, p);
}

} // namespace sparsenet::cuda
