// Squared norms of every block of the dense weight gradient, on any architecture, for every block size, matrix size and
// dtype.
//
//   norms[r, c] = sum over the b x b block (r, c) of G[n, k]^2       G[n, k] = sum_m g[m, n] x[m, k], never stored
//
//               k (64)
//            +-----+-----+     The tile of grad_weight (block_sparse_linear_grad_weight_simt.cuh) over neighbouring
//   n        | r,c |     |     columns; its squares go to shared memory and are added per block, rows first, in a fixed
//   (64)     +-----+-----+     order. b = 128: a CTA walks its four 64 x 64 quarters.
//            |     |     |
//            +-----+-----+
//
// Bytes per output and row of the batch: 2 e b^2 / 64 from L2, e bytes an element; 2 b^2 FLOP.
#pragma once

#include "block_gradient_squared_norms.cuh"
#include "block_sparse_linear_grad_weight_simt.cuh"

namespace sparsenet::cuda {

using NormsConfig = GradWeightTileConfig<64>;

template <typename T>
SPARSENET_KERNEL(NormsConfig::kThreads)
gradient_norms_simt_kernel(const GradientNormsParams<T> p) {
  constexpr int kSide = NormsConfig::kSide, kPitch = kSide + 1;
  const int b = p.block_size;
  const int quarters = b > kSide ? b / kSide : 1;    // per dimension; a 128-block is four tiles
  const int tile_blocks = b > kSide ? 1 : kSide / b; // blocks per dimension of a tile
  const int64_t block_cols = ceil_div(p.k_size, b);
  const int64_t tiles_k = ceil_div(block_cols, tile_blocks);
  const int64_t row0 = p.row_begin + block_index() / tiles_k * tile_blocks;
  const int64_t col0 = block_index() % tiles_k * tile_blocks;

  // The squares and their row sums are float: they lie behind the tiles, whose type may be double.
  const int64_t tiles_bytes = 2 * sizeof(Accumulator<T>) * NormsConfig::kDepth * kSide;
  const Shared<float> squares = shared_array<float>(tiles_bytes);                       // [64][65]
  const Shared<float> row_sums = shared_array<float>(tiles_bytes + 4 * kSide * kPitch); // [64][tile_blocks]
  const int thread = thread_index();
  const int lane_k = thread % NormsConfig::kLanesK, lane_n = thread / NormsConfig::kLanesK;

  float total = 0; // of a 128-block, in thread 0
  for (int quarter = 0; quarter < quarters * quarters; ++quarter) {
    GradWeightTile<T, NormsConfig> tile;
    tile.accumulate(p, row0 * b + quarter / quarters * kSide, col0 * b + quarter % quarters * kSide, {0, p.batch});
    SPARSENET_UNROLL
    for (int i = 0; i < NormsConfig::kThreadN; ++i) {
      SPARSENET_UNROLL
      for (int j = 0; j < NormsConfig::kThreadK; ++j) {
        const auto sum = static_cast<float>(tile.sums[i][j]);
        squares[(lane_n + i * NormsConfig::kLanesN) * kPitch + lane_k + j * NormsConfig::kLanesK] = sum * sum;
      }
    }
    sync_block();
    const int width = b > kSide ? kSide : b;
    for (int i = thread; i < kSide * tile_blocks; i += NormsConfig::kThreads) {
      float sum = 0;
      for (int j = 0; j < width; ++j) sum += squares[i / tile_blocks * kPitch + i % tile_blocks * width + j];
      row_sums[i] = sum;
    }
    sync_block();
    for (int i = thread; i < tile_blocks * tile_blocks; i += NormsConfig::kThreads) {
      float sum = 0;
      for (int j = 0; j < width; ++j) sum += row_sums[(i / tile_blocks * width + j) * tile_blocks + i % tile_blocks];
      total += sum;
      const int64_t row = row0 + i / tile_blocks, col = col0 + i % tile_blocks;
      if (quarter == quarters * quarters - 1 && row < p.row_end && col < block_cols)
        store_global(p.norms + (row - p.row_begin) * block_cols + col, quarters > 1 ? total : sum);
    }
    // The next quarter's first barrier keeps its squares behind these reads.
  }
}

template <typename T>
void launch_gradient_norms_simt(const GradientNormsParams<T>& p, Stream stream) {
  constexpr int kSide = NormsConfig::kSide;
  const int64_t tile_blocks = p.block_size > kSide ? 1 : kSide / p.block_size;
  const int64_t block_cols = ceil_div(p.k_size, p.block_size);
  const int64_t tiles_bytes = static_cast<int64_t>(2 * sizeof(Accumulator<T>)) * NormsConfig::kDepth * kSide;
  launch("gradient_norms_simt", gradient_norms_simt_kernel<T>,
         {.ctas = ceil_div(p.row_end - p.row_begin, tile_blocks) * ceil_div(block_cols, tile_blocks),
          .threads = NormsConfig::kThreads,
          .shared_bytes = tiles_bytes + 4 * kSide * (kSide + 1) + 4 * kSide * tile_blocks},
         stream, p);
}

} // namespace sparsenet::cuda
