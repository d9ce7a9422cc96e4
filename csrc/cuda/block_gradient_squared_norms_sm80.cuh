// Squared norms of every block of the dense weight gradient on tensor cores (sm_80 and later).
//
//   norms[r, c] = sum over the b x b block (r, c) of G[n, k]^2       G[n, k] = sum_m g[m, n] x[m, k], never stored
//
//                128 columns of x
//               +---------+---------+     The pipeline of grad_weight (block_sparse_linear_grad_weight_sm80.cuh) over
//   128         | warp 0  | warp 1  |     neighbouring columns, with the tile of b = 128 whatever the block size is. A
//   columns     +---------+---------+     warp owns 64 x 64 of G, squares it in registers and adds by shuffles in a
//   of g        | warp 2  | warp 3  |     fixed order; the four quarters of a 128-block meet in shared memory.
//               +---------+---------+
//
// Per CTA and row of the batch: 256 elements from L2 for 2 * 128 * 128 FLOP; that is e b^2 / 64 bytes per output, e
// bytes an element.
#pragma once

#include "block_gradient_squared_norms.cuh"
#include "block_sparse_linear_grad_weight_sm80.cuh"

namespace sparsenet::cuda {

template <typename T, int kBlock>
SPARSENET_KERNEL(Sm80GradWeightConfig<T, 128>::kThreads)
gradient_norms_sm80_kernel(const GradientNormsParams<T> p) {
  using Config = Sm80GradWeightConfig<T, 128>;
  constexpr int kTileBlocks = Config::kColumns / kBlock;
  const int64_t block_cols = ceil_div(p.k_size, kBlock);
  const int64_t tiles_k = ceil_div(block_cols, kTileBlocks);
  const int64_t row0 = p.row_begin + block_index() / tiles_k * kTileBlocks;
  const int64_t col0 = block_index() % tiles_k * kTileBlocks;
  const int column = thread_index() % Config::kRowChunks * Config::kChunk;
  Sm80GradWeight<T, Config> tile{p, row0 * kBlock + column, col0 * kBlock + column};
  tile.run({0, p.batch});

  constexpr int kSpan = kBlock < 64 ? kBlock : 64; // side of what one warp has of a block
  const int n_part = Config::part_n(warp_index(), 0), k_part = Config::part_k(warp_index(), 0);
  const Shared<float> quarters = shared_array<float>(Config::kSharedBytes); // of a 128-block, behind the pipeline
  SPARSENET_UNROLL
  for (int n = 0; n < 64; n += kSpan) {
    SPARSENET_UNROLL
    for (int k = 0; k < 64; k += kSpan) {
      float sum = 0;
      SPARSENET_UNROLL
      for (int i = n / 16; i < (n + kSpan) / 16; ++i) {
        SPARSENET_UNROLL
        for (int j = k / 8; j < (k + kSpan) / 8; ++j) {
          SPARSENET_UNROLL
          for (int e = 0; e < 4; ++e) sum += tile.sums[0][i][j][e] * tile.sums[0][i][j][e];
        }
      }
      SPARSENET_UNROLL
      for (int distance = 16; distance >= 1; distance /= 2) sum += shuffle_xor(sum, distance);
      if (lane_index() != 0) continue;
      if constexpr (kBlock == 128) {
        quarters[warp_index()] = sum;
      } else {
        const int64_t row = row0 + (n_part + n) / kBlock, col = col0 + (k_part + k) / kBlock;
        if (row < p.row_end && col < block_cols) store_global(p.norms + (row - p.row_begin) * block_cols + col, sum);
      }
    }
  }
  if constexpr (kBlock == 128) {
    sync_block();
    if (thread_index() != 0) return;
    float sum = 0;
    for (int warp = 0; warp < 4; ++warp) sum += quarters[warp];
    store_global(p.norms + (row0 - p.row_begin) * block_cols + col0, sum);
  }
}

template <typename T, int kBlock>
void launch_gradient_norms_block(const GradientNormsParams<T>& p, Stream stream) {
  using Config = Sm80GradWeightConfig<T, 128>;
  constexpr int kTileBlocks = Config::kColumns / kBlock;
  launch(sizeof(T) == 4 ? "gradient_norms_tf32_sm80" : "gradient_norms_sm80", gradient_norms_sm80_kernel<T, kBlock>,
         {.ctas = ceil_div(p.row_end - p.row_begin, kTileBlocks) * ceil_div(ceil_div(p.k_size, kBlock), kTileBlocks),
          .threads = Config::kThreads,
          .shared_bytes = Config::kSharedBytes + 16},
         stream, p);
}

template <typename T>
void launch_gradient_norms_sm80(const GradientNormsParams<T>& p, Stream stream) {
  switch (p.block_size) {
  case 16:
    return launch_gradient_norms_block<T, 16>(p, stream);
  case 32:
    return launch_gradient_norms_block<T, 32>(p, stream);
  case 64:
    return launch_gradient_norms_block<T, 64>(p, stream);
  default:
    return launch_gradient_norms_block<T, 128>(p, stream);
  }
}

} // namespace sparsenet::cuda
