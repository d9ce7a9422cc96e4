// What the kernels of forward and grad_input share: the parameters of a product, the meaning of a work item, and the
// last step that adds up the partial sums of groups that were split.
//
// Both products are one: y[m, n] = activation(sum over k of a[m, k] w(n, k) + bias[n]), where a row n belongs to a
// "line" of blocks (a block row in forward, a block column in grad_input) and w is the block read as it lies
// (forward) or transposed (grad_input).
#pragma once

#include "device/activation.cuh"
#include "device/elements.cuh"
#include "host/launch.h"

namespace sparsenet::cuda {

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

// One finished element: bias, optional copy before the activation, activation, rounding.
template <typename T>
SPARSENET_DEVICE void write_element(const Product<T>& p, int64_t m, int64_t n, Accumulator<T> sum) {
  if (p.bias != nullptr) sum += to_accumulator(load_global(p.bias + n));
  if (p.pre_activation != nullptr)
    store_global(p.pre_activation + m * p.pre_activation_stride + n, from_accumulator<T>(sum));
  store_global(p.y + m * p.y_stride + n, from_accumulator<T>(activate(sum, p.activation)));
}

// add_partials: y = activation(sum over the pieces of a group, in order, + bias). One CTA per work item and 256-element
// piece of its [M, width] tile; only the first item of a split group works. Bytes per output: 4 (8 for float64) read
// per piece, one element written.
struct AddPartialsConfig {
  static constexpr int kThreads = 256;
};
template <typename T>
struct AddPartials {
  Product<T> product;
  int64_t width; // columns of a partial tile: rows_per_group * b
  int64_t ctas_per_item;
};

template <typename T>
SPARSENET_KERNEL(AddPartialsConfig::kThreads)
add_partials_kernel(const AddPartials<T> params) {
  const Product<T>& p = params.product;
  const WorkItem item = work_item(p, block_index() / params.ctas_per_item);
  if (item.slot < 0 || item.piece != 0) return;
  const int64_t element = block_index() % params.ctas_per_item * AddPartialsConfig::kThreads + thread_index();
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
  AddPartials<T> params{product, width, ceil_div(product.batch * width, AddPartialsConfig::kThreads)};
  launch("add_partials", add_partials_kernel<T>,
         {.ctas = product.num_items * params.ctas_per_item, .threads = AddPartialsConfig::kThreads}, stream, params);
}

// The variants, each instantiated in the .cu file of its name; choose_product (host/choose.cu) picks one.
template <typename T, bool kTransposed>
void launch_product_simt(const Product<T>& product, Stream stream);
template <typename T, bool kTransposed>
void launch_product_sm80(const Product<T>& product, Stream stream);
template <typename T>
void launch_product_small_batch_sm80(const Product<T>& product, Stream stream);

} // namespace sparsenet::cuda
