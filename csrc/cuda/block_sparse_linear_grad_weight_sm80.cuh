// grad_weight at a list of places on tensor cores (sm_80 and later).
//
//   G[n, k] = sum_m g[m, n] x[m, k]       bfloat16, float16, or float32 as tf32 in, fp32 sums
//
//                128 columns of g             128 columns of x
//               +----+----+----+----+        +----+----+----+----+
//   kDepth rows | r0 | r1 | r2 | r3 |        | c0 | c1 | c2 | c3 |     cp.async by all threads, 16 bytes each,
//               +----+----+----+----+        +----+----+----+----+     kStages stages, one barrier a stage
//
//   A CTA owns 128 / b places; their rows of g and columns of x are gathered side by side. b = 16: two places a warp;
//   b = 32: one; b = 64: half of one; b = 128: a quarter. Both operands are stored [m][columns], so both fragments are
//   read across rows (device/fragments_sm80.cuh). The batch may be split; the fp32 sums of the splits are added in
//   order.
//
// Per CTA and row of the batch: 256 elements from L2 for 2 * 128 * b FLOP; that is 2 e / b bytes per output, e bytes an
// element.
#pragma once

#include "device/fragments_sm80.cuh"
#include "block_sparse_linear_grad_weight.cuh"

namespace sparsenet::cuda {

template <typename T, int kBlock_>
struct Sm80GradWeightConfig {
  static constexpr int kBlock = kBlock_;
  static constexpr int kThreads = 128;
  static constexpr int kColumns = 128;
  static constexpr int kDepth = 64 / sizeof(T);
  static constexpr int kStages = 4;
  static constexpr int kChunk = Fragment<T>::kChunk;
  static constexpr int kRowChunks = kColumns / kChunk;
  static constexpr int kPlaces = kColumns / kBlock;
  static constexpr int kParts = kBlock == 16 ? 2 : 1;                      // places of a warp
  static constexpr int kTilesN = kBlock == 16 ? 1 : kBlock == 128 ? 4 : 2; // n16 tiles of a part
  static constexpr int kTilesK = kBlock == 16 ? 2 : kBlock == 32 ? 4 : 8;  // k8 tiles of a part
  static constexpr int kElements = kDepth * kColumns;
  static constexpr int kStageBytes = 2 * sizeof(T) * kElements;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static_assert(kDepth % Fragment<T>::kDepth == 0, "a stage is walked in whole instructions");
  static_assert(64 % kDepth == 0, "splits of the batch start on whole stages");
  static_assert(kTilesN * 16 * kTilesK * 8 * kParts * 4 == kPlaces * kBlock * kBlock,
                "the warps cover every place once");

  // Where a warp's part lies among the 128 columns of g and of x.
  SPARSENET_DEVICE static int part_n(int warp, int part) {
    return kBlock == 16 ? (2 * warp + part) * 16 : kBlock == 128 ? warp / 2 * 64 : warp * 32;
  }
  SPARSENET_DEVICE static int part_k(int warp, int part) {
    return kBlock == 16   ? (2 * warp + part) * 16
           : kBlock == 32 ? warp * 32
           : kBlock == 64 ? warp / 2 * 64
                          : warp % 2 * 64;
  }
};

template <typename T, typename Config>
struct Sm80GradWeight {
  const GradientOperands<T>& p;
  // This thread always copies the same chunk of columns of both tiles. Past the end: not read, zero.
  int64_t g_column;
  int64_t x_column;
  float sums[Config::kParts][Config::kTilesN][Config::kTilesK][4] = {};

  SPARSENET_DEVICE static int valid_columns(int64_t column, int64_t size) {
    const int64_t left = size - column;
    return left >= Config::kChunk ? Config::kChunk : left > 0 ? static_cast<int>(left) : 0;
  }

  SPARSENET_DEVICE void load_stage(int stage, int64_t first_row, int64_t end_row) const {
    const Shared<T> g_s = shared_array<T>(stage * Config::kStageBytes);
    const Shared<T> x_s = g_s + Config::kElements;
    constexpr int kBytes = sizeof(T);
    const int chunk = thread_index() % Config::kRowChunks;
    const int g_valid = valid_columns(g_column, p.n_size), x_valid = valid_columns(x_column, p.k_size);
    SPARSENET_UNROLL
    for (int row = thread_index() / Config::kRowChunks; row < Config::kDepth;
         row += Config::kThreads / Config::kRowChunks) {
      const int64_t m = first_row + row;
      const int offset = row * Config::kColumns + swizzled<T>(chunk, row) * Config::kChunk;
      const bool g_inside = m < end_row && g_valid > 0, x_inside = m < end_row && x_valid > 0;
      async_copy_16(g_s + offset, g_inside ? p.g + m * p.g_stride + g_column : p.g, g_inside ? kBytes * g_valid : 0);
      async_copy_16(x_s + offset, x_inside ? p.x + m * p.x_stride + x_column : p.x, x_inside ? kBytes * x_valid : 0);
    }
  }

  SPARSENET_DEVICE void multiply_stage(int stage) {
    const Shared<T> g_s = shared_array<T>(stage * Config::kStageBytes);
    const Shared<T> x_s = g_s + Config::kElements;
    SPARSENET_UNROLL
    for (int m = 0; m < Config::kDepth; m += Fragment<T>::kDepth) {
      SPARSENET_UNROLL
      for (int part = 0; part < Config::kParts; ++part) {
        uint32_t g[Config::kTilesN][4];
        SPARSENET_UNROLL
        for (int i = 0; i < Config::kTilesN; ++i)
          load_columns_a<T, Config::kColumns>(g[i], g_s, m, Config::part_n(warp_index(), part) + i * 16);
        SPARSENET_UNROLL
        for (int j = 0; j < Config::kTilesK; j += 2) {
          uint32_t x[4];
          load_columns_b<T, Config::kColumns>(x, x_s, m, Config::part_k(warp_index(), part) + j * 8);
          SPARSENET_UNROLL
          for (int i = 0; i < Config::kTilesN; ++i) {
            multiply_add<T>(sums[part][i][j], g[i], x[0], x[1]);
            multiply_add<T>(sums[part][i][j + 1], g[i], x[2], x[3]);
          }
        }
      }
    }
  }

  SPARSENET_DEVICE void run(BatchRange range) {
    int64_t next_row = range.begin;
    for (int stage = 0; stage < Config::kStages - 1; ++stage, next_row += Config::kDepth) {
      if (next_row < range.end) load_stage(stage, next_row, range.end);
      async_commit();
    }
    int stage = 0, free_stage = Config::kStages - 1;
    for (int64_t row = range.begin; row < range.end; row += Config::kDepth, next_row += Config::kDepth) {
      async_wait<Config::kStages - 2>();
      sync_block(); // the stage is complete for all, and the stage read last is free again
      if (next_row < range.end) load_stage(free_stage, next_row, range.end);
      async_commit();
      multiply_stage(stage);
      free_stage = stage;
      stage = stage + 1 == Config::kStages ? 0 : stage + 1;
    }
  }
};

template <typename T, typename Config>
SPARSENET_KERNEL(Config::kThreads)
grad_weight_sm80_kernel(const GradWeight<T> p) {
  constexpr int kBlock = Config::kBlock;
  const auto cta = static_cast<uint32_t>(block_index());
  const auto place_groups = static_cast<uint32_t>(ceil_div(p.num_places, Config::kPlaces));
  const int64_t first_place = static_cast<int64_t>(cta % place_groups) * Config::kPlaces;
  const int split = static_cast<int>(cta / place_groups);

  const int column = thread_index() % Config::kRowChunks * Config::kChunk;
  const int64_t place = first_place + column / kBlock;
  int64_t g_column = p.n_size, x_column = p.k_size; // no place: nothing is read
  if (place < p.num_places) {
    g_column = static_cast<int64_t>(load_global(p.place_rows + place)) * kBlock + column % kBlock;
    x_column = static_cast<int64_t>(load_global(p.place_cols + place)) * kBlock + column % kBlock;
  }
  Sm80GradWeight<T, Config> tile{p, g_column, x_column};
  tile.run(batch_range(p.batch, split, p.splits));

  SPARSENET_UNROLL
  for (int part = 0; part < Config::kParts; ++part) {
    const int n_part = Config::part_n(warp_index(), part), k_part = Config::part_k(warp_index(), part);
    const int64_t part_place = first_place + n_part / kBlock;
    if (part_place >= p.num_places) continue;
    SPARSENET_UNROLL
    for (int i = 0; i < Config::kTilesN; ++i) {
      SPARSENET_UNROLL
      for (int j = 0; j < Config::kTilesK; ++j) {
        SPARSENET_UNROLL
        for (int e = 0; e < 4; ++e) {
          const int n = (n_part + i * 16 + e / 2 * 8 + lane_index() / 4) % kBlock;
          const int k = (k_part + j * 8 + lane_index() % 4 * 2 + e % 2) % kBlock;
          write_gradient(p, split, (part_place * kBlock + n) * kBlock + k, tile.sums[part][i][j][e]);
        }
      }
    }
  }
}

template <typename T, int kBlock>
void launch_grad_weight_block(const GradWeight<T>& p, Stream stream) {
  using Config = Sm80GradWeightConfig<T, kBlock>;
  launch(sizeof(T) == 4 ? "grad_weight_tf32_sm80" : "grad_weight_sm80", grad_weight_sm80_kernel<T, Config>,
         {.ctas = ceil_div(p.num_places, Config::kPlaces) * p.splits,
          .threads = Config::kThreads,
          .shared_bytes = Config::kSharedBytes},
         stream, p);
}

template <typename T>
void launch_grad_weight_sm80(const GradWeight<T>& p, Stream stream) {
  switch (p.block_size) {
  case 16:
    launch_grad_weight_block<T, 16>(p, stream);
    break;
  case 32:
    launch_grad_weight_block<T, 32>(p, stream);
    break;
  case 64:
    launch_grad_weight_block<T, 64>(p, stream);
    break;
  default:
    launch_grad_weight_block<T, 128>(p, stream);
    break;
  }
  if (p.partials != nullptr) launch_reduce_splits(p, stream);
}

} // namespace sparsenet::cuda
