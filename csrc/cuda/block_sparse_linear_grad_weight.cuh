// What every kernel over G = g^T x shares (grad_weight, candidate gradients, gradient norms): the operands. What
// grad_weight and candidate gradients share: the places, how the batch is split, and the ordered sum over the splits.
#pragma once

#include "device/elements.cuh"
#include "host/choose.h"
#include "host/launch.h"

namespace sparsenet::cuda {

template <typename T>
struct GradientOperands {
  const T* g; // [M, n_size]
  const T* x; // [M, k_size]
  int64_t g_stride;
  int64_t x_stride;
  int64_t batch; // M
  int64_t n_size;
  int64_t k_size;
  int32_t block_size;
};

template <typename T>
GradientOperands<T> gradient_operands(const Matrix& grad_z, const Matrix& x, int32_t block_size) {
  return {.g = static_cast<const T*>(grad_z.data),
          .x = static_cast<const T*>(x.data),
          .g_stride = grad_z.stride,
          .x_stride = x.stride,
          .batch = x.rows,
          .n_size = grad_z.cols,
          .k_size = x.cols,
          .block_size = block_size};
}

template <typename T>
struct GradWeight : GradientOperands<T> {
  const int32_t* place_rows; // [num_places]
  const int32_t* place_cols; // [num_places]
  int64_t num_places;
  T* gradients;             // [num_places, b, b]
  Accumulator<T>* partials; // [splits, num_places, b, b]; null: one split, straight to gradients
  int32_t splits;
};

// Batch rows [begin, end) of a split; whole multiples of 64 rows so that no tile straddles two splits.
struct BatchRange {
  int64_t begin;
  int64_t end;
};
SPARSENET_DEVICE BatchRange batch_range(int64_t batch, int split, int splits) {
  const int64_t rows = ceil_div(ceil_div(batch, 64), splits) * 64;
  const int64_t begin = split * rows < batch ? split * rows : batch;
  return {begin, begin + rows < batch ? begin + rows : batch};
}

template <typename T>
SPARSENET_DEVICE void write_gradient(const GradWeight<T>& p, int split, int64_t offset, Accumulator<T> sum) {
  if (p.partials == nullptr)
    store_global(p.gradients + offset, from_accumulator<T>(sum));
  else
    store_global(p.partials + split * p.num_places * p.block_size * p.block_size + offset, sum);
}

// reduce_splits: G = the sum of its splits' partial sums, in order, a thread per element. Bytes per output: 4 (8 for
// float64) read per split, one element written.
struct ReduceConfig {
  static constexpr int kThreads = 256;
};

template <typename T>
SPARSENET_KERNEL(ReduceConfig::kThreads)
reduce_splits_kernel(const GradWeight<T> p) {
  const int64_t elements = p.num_places * p.block_size * p.block_size;
  const int64_t element = block_index() * ReduceConfig::kThreads + thread_index();
  if (element >= elements) return;
  Accumulator<T> sum = 0;
  for (int split = 0; split < p.splits; ++split) sum += load_global(p.partials + split * elements + element);
  store_global(p.gradients + element, from_accumulator<T>(sum));
}

template <typename T>
void launch_reduce_splits(const GradWeight<T>& p, Stream stream) {
  launch("reduce_splits", reduce_splits_kernel<T>,
         {.ctas = ceil_div(p.num_places * p.block_size * p.block_size, ReduceConfig::kThreads),
          .threads = ReduceConfig::kThreads},
         stream, p);
}

// The variants, each instantiated in the .cu file of its name.
template <typename T>
void launch_grad_weight_simt(const GradWeight<T>& p, Stream stream);
template <typename T>
void launch_grad_weight_sm80(const GradWeight<T>& p, Stream stream);

template <typename T>
void launch_grad_weight(const GradWeight<T>& p, GradWeightKernel kernel, Stream stream) {
  if constexpr (sizeof(T) <= 4)
    if (kernel == GradWeightKernel::sm80) return launch_grad_weight_sm80<T>(p, stream);
  launch_grad_weight_simt<T>(p, stream);
}

} // namespace sparsenet::cuda
