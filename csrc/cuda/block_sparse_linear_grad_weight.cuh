// What every kernel over G = g^T x shares (grad_weight, candidate gradients, gradient norms): the parameters, how the
// batch is split, and the ordered sum over the splits.
#pragma once

#include "block_sparse_linear_product.cuh"

namespace sparsenet::cuda {

template <typename T>
struct OuterProduct {
  const T* g; // [M, n_size]
  const T* x; // [M, k_size]
  int64_t g_stride;
  int64_t x_stride;
  int64_t batch; // M
  int64_t n_size;
  int64_t k_size;
  int32_t block_size;
  // grad_weight
  const int32_t* place_rows; // [num_places]
  const int32_t* place_cols; // [num_places]
  int64_t num_places;
  T* gradients;             // [num_places, b, b]
  Accumulator<T>* partials; // [splits, num_places, b, b]; null: one split, straight to gradients
  int32_t splits;
  // norms
  int64_t row_begin; // in blocks
  int64_t row_end;
  float* norms; // [row_end - row_begin, ceil(k_size / b)]
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
SPARSENET_DEVICE void write_gradient(const OuterProduct<T>& p, int split, int64_t offset, Accumulator<T> sum) {
  if (p.partials == nullptr)
    store_global(p.gradients + offset, from_accumulator<T>(sum));
  else
    store_global(p.partials + split * p.num_places * p.block_size * p.block_size + offset, sum);
}

struct ReduceConfig {
  static constexpr int kThreads = 256;
};

template <typename T>
SPARSENET_KERNEL(ReduceConfig::kThreads)
reduce_splits_kernel(const OuterProduct<T> p) {
  const int64_t elements = p.num_places * p.block_size * p.block_size;
  const int64_t element = block_index() * ReduceConfig::kThreads + thread_index();
  if (element >= elements) return;
  Accumulator<T> sum = 0;
  for (int split = 0; split < p.splits; ++split) sum += load_global(p.partials + split * elements + element);
  store_global(p.gradients + element, from_accumulator<T>(sum));
}

template <typename T>
void launch_reduce_splits(const OuterProduct<T>& p, Stream stream) {
  launch("reduce_splits", reduce_splits_kernel<T>,
         {.ctas = ceil_div(p.num_places * p.block_size * p.block_size, ReduceConfig::kThreads),
          .threads = ReduceConfig::kThreads},
         stream, p);
}

// The variants, each instantiated in the .cu file of its name.
template <typename T>
void launch_grad_weight_simt(const OuterProduct<T>& p, Stream stream);
template <typename T>
void launch_gradient_norms_simt(const OuterProduct<T>& p, Stream stream);
template <typename T>
void launch_grad_weight_sm80(const OuterProduct<T>& p, Stream stream);
template <typename T>
void launch_gradient_norms_sm80(const OuterProduct<T>& p, Stream stream);

} // namespace sparsenet::cuda
