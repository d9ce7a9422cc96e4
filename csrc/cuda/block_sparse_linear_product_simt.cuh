// forward and grad_input on any architecture, for every block size, matrix size and dtype, in full precision.
//
//   y[m, n] = activation(sum_k a[m, k] w(n, k) + bias[n])
//
// b >= 16 (tile kernel): one CTA makes a kBatch x kColumns tile of y, kColumns = min(b, 64), for one line of blocks.
//
//             k: the line's blocks, kDepth columns at a time
//            +------------------+        a_s [kDepth][kBatch + 1]     all threads load both tiles, coalesced along k
//   kBatch   | a (gathered)     |        w_s [kDepth][kColumns + 1]   (forward) or n (grad_input); a barrier each way
//            +------------------+        kThreadM x kThreadN sums a thread live in registers over the whole line
//
//   From L2 per block and batch tile of kBatch b outputs: kBatch b + b b elements for 2 kBatch b b FLOP. Shared memory:
//   2 reads of kThreadM + kThreadN words per kThreadM kThreadN multiply-adds. The odd pitch keeps the transposing
//   stores free of bank conflicts for 4-byte types.
//
// b < 16 (row kernel): a thread owns one output column and kRowBatch batch rows; lanes run along n so that y is written
//   coalesced, and each weight read serves kRowBatch rows. Made to be right at every size, not to be fast.
#pragma once

#include "block_sparse_linear_product.cuh"

namespace sparsenet::cuda {

template <int kColumns_, int kBatch_>
struct SimtTileConfig {
  static constexpr int kThreads = 128;
  static constexpr int kColumns = kColumns_;
  static constexpr int kBatch = kBatch_;
  static constexpr int kDepth = 16;
  static constexpr int kThreadN = kColumns == 64 ? 4 : kColumns == 32 ? (kBatch == 16 ? 2 : 4) : (kBatch == 16 ? 1 : 2);
  static constexpr int kLanesN = kColumns / kThreadN;
  static constexpr int kLanesM = kThreads / kLanesN;
  static constexpr int kThreadM = kBatch / kLanesM;
  static_assert(kLanesN * kLanesM == kThreads, "the threads must cover the tile exactly once");
  static_assert(kThreadM * kLanesM == kBatch && kThreadM > 0, "each thread owns whole rows of the tile");
  static_assert(kColumns % kDepth == 0, "a block is walked in whole steps of kDepth");
};

template <typename T, bool kTransposed, typename Config>
SPARSENET_KERNEL(Config::kThreads, sizeof(T) == 8 ? 2 : 4)
product_simt_kernel(const Product<T> p) {
  using A = Accumulator<T>;
  constexpr int kPitchA = Config::kBatch + 1, kPitchW = Config::kColumns + 1;
  const Shared<A> a_s = shared_array<A>(0);
  const Shared<A> w_s = shared_array<A>(sizeof(A) * Config::kDepth * kPitchA);

  const int b = p.block_size;
  const auto cta = static_cast<uint32_t>(block_index()),
             batch_tiles = static_cast<uint32_t>(ceil_div(p.batch, Config::kBatch));
  const uint32_t slabs = static_cast<uint32_t>(b) / Config::kColumns; // b = 128: two slabs of 64 columns
  const int64_t m0 = static_cast<int64_t>(cta % batch_tiles) * Config::kBatch;
  const WorkItem item = work_item(p, cta / batch_tiles / slabs);
  const int thread = thread_index();
  const int lane_n = thread % Config::kLanesN, lane_m = thread / Config::kLanesN;
  const int n_in_block = static_cast<int>(cta / batch_tiles % slabs) * Config::kColumns;

  const int32_t line_begin = load_global(p.pointers + item.group);
  const int32_t line_blocks = load_global(p.pointers + item.group + 1) - line_begin;
  const int32_t begin = line_begin + piece_start(line_blocks, item.piece, item.pieces);
  const int32_t end = line_begin + piece_start(line_blocks, item.piece + 1, item.pieces);

  A sums[Config::kThreadM][Config::kThreadN] = {};
  for (int32_t position = begin; position < end; ++position) {
    const int64_t block = p.blocks == nullptr ? position : load_global(p.blocks + position);
    const int64_t k_block = static_cast<int64_t>(load_global(p.indices + position)) * b;
    const T* values = p.values + block * b * b;
    for (int k0 = 0; k0 < b; k0 += Config::kDepth) {
      sync_block(); // the last step's tiles have been read
      for (int i = thread; i < Config::kBatch * Config::kDepth; i += Config::kThreads) {
        const int m = i / Config::kDepth, k = i % Config::kDepth;
        const int64_t k_global = k_block + k0 + k;
        A value = 0; // outside the matrix: zero, whatever memory holds there
        if (m0 + m < p.batch && k_global < p.k_size)
          value = to_accumulator(load_global(p.a + (m0 + m) * p.a_stride + k_global));
        a_s[k * kPitchA + m] = value;
      }
      for (int i = thread; i < Config::kColumns * Config::kDepth; i += Config::kThreads) {
        const int n = kTransposed ? i % Config::kColumns : i / Config::kDepth;
        const int k = kTransposed ? i / Config::kColumns : i % Config::kDepth;
        const int64_t offset = kTransposed ? static_cast<int64_t>(k0 + k) * b + n_in_block + n
                                           : static_cast<int64_t>(n_in_block + n) * b + k0 + k;
        w_s[k * kPitchW + n] = to_accumulator(load_global(values + offset));
      }
      sync_block();
      SPARSENET_UNROLL
      for (int k = 0; k < Config::kDepth; ++k) {
        A a[Config::kThreadM], w[Config::kThreadN];
        SPARSENET_UNROLL
        for (int i = 0; i < Config::kThreadM; ++i) a[i] = a_s[k * kPitchA + lane_m + i * Config::kLanesM];
        SPARSENET_UNROLL
        for (int j = 0; j < Config::kThreadN; ++j) w[j] = w_s[k * kPitchW + lane_n + j * Config::kLanesN];
        SPARSENET_UNROLL
        for (int i = 0; i < Config::kThreadM; ++i) {
          SPARSENET_UNROLL
          for (int j = 0; j < Config::kThreadN; ++j) sums[i][j] += a[i] * w[j];
        }
      }
    }
  }

  SPARSENET_UNROLL
  for (int i = 0; i < Config::kThreadM; ++i) {
    SPARSENET_UNROLL
    for (int j = 0; j < Config::kThreadN; ++j) {
      const int64_t m = m0 + lane_m + i * Config::kLanesM;
      const int column = n_in_block + lane_n + j * Config::kLanesN;
      const int64_t n = static_cast<int64_t>(item.group) * b + column;
      if (m >= p.batch) continue;
      if (item.slot >= 0)
        store_global(p.partials + ((item.slot + item.piece) * p.batch + m) * b + column, sums[i][j]);
      else if (n < p.n_size)
        write_element(p, m, n, sums[i][j]);
    }
  }
}

struct SimtRowConfig {
  static constexpr int kThreads = 128;
  static constexpr int kRowBatch = 8;
};

template <typename T, bool kTransposed>
SPARSENET_KERNEL(SimtRowConfig::kThreads)
product_rows_simt_kernel(const Product<T> p) {
  using A = Accumulator<T>;
  constexpr int kRowBatch = SimtRowConfig::kRowBatch;
  const int b = p.block_size;
  const int64_t column_tiles = ceil_div(p.n_size, SimtRowConfig::kThreads);
  const int64_t n = block_index() % column_tiles * SimtRowConfig::kThreads + thread_index();
  const int64_t m0 = block_index() / column_tiles * kRowBatch;
  if (n >= p.n_size) return;
  const int64_t line = n / b;
  const int n_in_block = static_cast<int>(n % b);

  A sums[kRowBatch] = {};
  const int32_t end = load_global(p.pointers + line + 1);
  for (int32_t position = load_global(p.pointers + line); position < end; ++position) {
    const int64_t block = p.blocks == nullptr ? position : load_global(p.blocks + position);
    const int64_t k_block = static_cast<int64_t>(load_global(p.indices + position)) * b;
    for (int k = 0; k < b && k_block + k < p.k_size; ++k) {
      const int64_t offset = kTransposed ? block * b * b + k * b + n_in_block : block * b * b + n_in_block * b + k;
      const A weight = to_accumulator(load_global(p.values + offset));
      SPARSENET_UNROLL
      for (int i = 0; i < kRowBatch; ++i) {
        if (m0 + i < p.batch)
          sums[i] += to_accumulator(load_global(p.a + (m0 + i) * p.a_stride + k_block + k)) * weight;
      }
    }
  }
  SPARSENET_UNROLL
  for (int i = 0; i < kRowBatch; ++i) {
    if (m0 + i < p.batch) write_element(p, m0 + i, n, sums[i]);
  }
}

template <typename T, bool kTransposed, int kColumns, int kBatch>
void launch_product_tiles(const Product<T>& product, const char* name, Stream stream) {
  using Config = SimtTileConfig<kColumns, kBatch>;
  const int64_t shared_bytes =
      static_cast<int64_t>(sizeof(Accumulator<T>)) * Config::kDepth * (kBatch + 1 + kColumns + 1);
  const int64_t ctas =
      static_cast<int64_t>(product.num_items) * (product.block_size / kColumns) * ceil_div(product.batch, kBatch);
  launch(name, product_simt_kernel<T, kTransposed, Config>,
         {.ctas = ctas, .threads = Config::kThreads, .shared_bytes = shared_bytes}, stream, product);
}

template <typename T, bool kTransposed>
void launch_product_simt(const Product<T>& product, Stream stream) {
  const char* name = kTransposed ? "grad_input_simt" : "forward_simt";
  if (product.block_size < 16) {
    const int64_t ctas =
        ceil_div(product.n_size, SimtRowConfig::kThreads) * ceil_div(product.batch, SimtRowConfig::kRowBatch);
    launch(kTransposed ? "grad_input_rows_simt" : "forward_rows_simt", product_rows_simt_kernel<T, kTransposed>,
           {.ctas = ctas, .threads = SimtRowConfig::kThreads}, stream, product);
    return;
  }
  const bool small_batch = product.batch <= 16;
  if (product.block_size == 16)
    small_batch ? launch_product_tiles<T, kTransposed, 16, 16>(product, name, stream)
                : launch_product_tiles<T, kTransposed, 16, 64>(product, name, stream);
  else if (product.block_size == 32)
    small_batch ? launch_product_tiles<T, kTransposed, 32, 16>(product, name, stream)
                : launch_product_tiles<T, kTransposed, 32, 64>(product, name, stream);
  else
    small_batch ? launch_product_tiles<T, kTransposed, 64, 16>(product, name, stream)
                : launch_product_tiles<T, kTransposed, 64, 64>(product, name, stream);
}

} // namespace sparsenet::cuda
