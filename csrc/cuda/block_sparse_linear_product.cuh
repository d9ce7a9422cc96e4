// What every kernel of block_sparse_linear shares: the parameters of a product, the meaning of a work item, the
// activations, and the last step that adds up the partial sums of groups that were split.
//
// Both products are one: y[m, n] = activation(sum over k of a[m, k] w(n, k) + bias[n]), where a row n belongs to a
// "line" of blocks (a block row in forward, a block column in grad_input) and w is the block read as it lies
// (forward) or transposed (grad_input).
#pragma once

#include "../types.h"
#include "device/intrinsics.cuh"
#include "host/launch.h"
#include "host/ops.h"

namespace sparsenet::cuda {

template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

template <typename T>
struct Product {
  const int32_t* pointers; // [lines + 1]: crow, or t_crow
  const int32_t* indices;  // [num_blocks] the blocks' k-index: col, or t_row
  const int32_t* blocks;   // [num_blocks] where a block's values are; null: at its own position
  const WorkItem* items;   // null: item i is line or group i, whole
  int32_t num_items;
  int32_t block_size;
  Activation activation;
  int64_t batch; // M
  int64_t k_size;
  int64_t n_size;
  const T* a; // [M, k_size]
  int64_t a_stride;
  const T* values; // [num_blocks, b, b]
  const T* bias;   // [n_size] or null
  T* y;            // [M, n_size]
  int64_t y_stride;
  T* pre_activation; // [M, n_size] or null
  int64_t pre_activation_stride;
  Accumulator<T>* partials; // [num_slots, M, rows_per_group * b]
};

template <typename T>
SPARSENET_DEVICE WorkItem work_item(const Product<T>& p, int64_t index) {
  if (p.items == nullptr) return {static_cast<int32_t>(index), 0, 1, -1};
  return load_global(p.items + index);
}

// Where piece `piece` of a line of `blocks` blocks starts: equal pieces but for the last ones. 32-bit arithmetic: a
// 64-bit division is a subroutine call on the device.
SPARSENET_DEVICE int32_t piece_start(int32_t blocks, int32_t piece, int32_t pieces) {
  if (piece == pieces) return blocks;
  const int32_t length = (blocks + pieces - 1) / pieces;
  return length * piece < blocks ? length * piece : blocks;
}

template <typename A>
SPARSENET_DEVICE A activate(A z, Activation activation) {
  switch (activation) {
  case Activation::relu:
    return z < A(0) ? A(0) : z; // NaN stays NaN
  case Activation::gelu:
    return A(0.5) * z * (A(1) + error_function(z * A(0.70710678118654752440)));
  case Activation::silu:
    return divide(z, A(1) + exponential(-z));
  default:
    return z;
  }
}

// The factor on grad_y: of the result y for relu, of the pre-activation z for gelu and silu.
template <typename A>
SPARSENET_DEVICE A activation_derivative(A saved, Activation activation) {
  switch (activation) {
  case Activation::relu:
    return saved > A(0) ? A(1) : A(0);
  case Activation::gelu:
    return A(0.5) * (A(1) + error_function(saved * A(0.70710678118654752440))) +
           saved * A(0.39894228040143267794) * exponential(A(-0.5) * saved * saved);
  case Activation::silu: {
    const A sigmoid = divide(A(1), A(1) + exponential(-saved));
    return sigmoid * (A(1) + saved * (A(1) - sigmoid));
  }
  default:
    return A(1);
  }
}

// One finished element: bias, optional copy before the activation, activation, rounding.
template <typename T>
SPARSENET_DEVICE void write_element(const Product<T>& p, int64_t m, int64_t n, Accumulator<T> sum) {
  if (p.bias != nullptr) sum += to_accumulator(load_global(p.bias + n));
  if (p.pre_activation != nullptr)
    store_global(p.pre_activation + m * p.pre_activation_stride + n, from_accumulator<T>(sum));
  store_global(p.y + m * p.y_stride + n, from_accumulator<T>(activate(sum, p.activation)));
}

// Fix-up: one CTA per work item and 256-element piece of its [M, width] tile; only the first item of a split group
// works.
struct FixupConfig {
  static constexpr int kThreads = 256;
};
template <typename T>
struct FixupParams {
  Product<T> product;
  int64_t width; // columns of a partial tile: rows_per_group * b
  int64_t ctas_per_item;
};

template <typename T>
SPARSENET_KERNEL(FixupConfig::kThreads)
add_partials_kernel(const FixupParams<T> params) {
  const Product<T>& p = params.product;
  const WorkItem item = work_item(p, block_index() / params.ctas_per_item);
  if (item.slot < 0 || item.piece != 0) return;
  const int64_t element = block_index() % params.ctas_per_item * FixupConfig::kThreads + thread_index();
  if (element >= p.batch * params.width) return;
  const int64_t m = element / params.width;
  const int64_t n = item.group * params.width + element % params.width;
  if (n >= p.n_size) return;
  Accumulator<T> sum = 0;
  for (int piece = 0; piece < item.pieces; ++piece)
    sum += load_global(p.partials + (item.slot + piece) * p.batch * params.width + element);
  write_element(p, m, n, sum);
}

template <typename T>
void launch_add_partials(const Product<T>& product, int64_t width, Stream stream) {
  FixupParams<T> params{product, width, ceil_div(product.batch * width, FixupConfig::kThreads)};
  launch("add_partials", add_partials_kernel<T>,
         {.ctas = product.num_items * params.ctas_per_item, .threads = FixupConfig::kThreads}, stream, params);
}

// Calls function(T{}) with the element type of dtype.
template <typename Function>
void with_dtype(DType dtype, const Function& function) {
  if (dtype == DType::float32 || dtype == kTf32) return function(float{});
  if (dtype == DType::float64) return function(double{});
  if (dtype == DType::bfloat16) return function(bfloat16{});
  return function(float16{});
}

// The variants, each instantiated in the .cu file of its name; choose_* in block_sparse_linear.cu picks one.
template <typename T, bool kTransposed>
void launch_product_simt(const Product<T>& product, Stream stream);
template <typename T, bool kTransposed>
void launch_product_sm80(const Product<T>& product, Stream stream);
template <typename T>
void launch_product_small_sm80(const Product<T>& product, Stream stream);

} // namespace sparsenet::cuda
