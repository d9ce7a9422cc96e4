// grad_weight at a list of places on any architecture, for every block size, matrix size and dtype.
//
//   G[n, k] = sum_m g[m, n] x[m, k]
//
//               k (kSide)
//            +-----------+     g_s [kDepth][kSide], x_s [kDepth][kSide]: both tiles are loaded coalesced along their
//   n        |    G      |     rows and read by all threads; kThreadN x kThreadK sums a thread in registers over the
//   (kSide)  +-----------+     CTA's share of the batch.
//
// grad_weight: kSide = min(b, 64), a CTA per block (four for b = 128) and batch split; with more than one split the
//   sums of each split go to scratch memory [splits, places b b] and a second kernel adds them in order: the same bits
//   every run.
//   b < 16: a warp per block, lanes over its elements, or over the batch where there are fewer elements than lanes.
//
// Bytes per output (an element of G) and row of the batch: 2 e / kSide from L2, e bytes an element; 2 FLOP.
#pragma once

#include "block_sparse_linear_grad_weight.cuh"

namespace sparsenet::cuda {

template <int kSide_>
struct GradWeightTileConfig {
  static constexpr int kThreads = 128;
  static constexpr int kSide = kSide_;
  static constexpr int kDepth = 16;
  static constexpr int kThreadK = kSide == 64 ? 4 : kSide == 32 ? 2 : 1;
  static constexpr int kLanesK = kSide / kThreadK;
  static constexpr int kLanesN = kThreads / kLanesK;
  static constexpr int kThreadN = kSide / kLanesN;
  static_assert(kLanesK * kLanesN == kThreads, "the threads must cover the tile exactly once");
  static_assert(kThreadN * kLanesN == kSide && kThreadN > 0, "each thread owns whole rows of the tile");
};

// Sums of one tile: element (i, j) of a thread is row lane_n + i kLanesN, column lane_k + j kLanesK.
template <typename T, typename Config>
struct GradWeightTile {
  using A = Accumulator<T>;
  A sums[Config::kThreadN][Config::kThreadK] = {};

  SPARSENET_DEVICE void accumulate(const GradientOperands<T>& p, int64_t n0, int64_t k0, BatchRange range) {
    const Shared<A> g_s = shared_array<A>(0);
    const Shared<A> x_s = shared_array<A>(sizeof(A) * Config::kDepth * Config::kSide);
    const int thread = thread_index();
    const int lane_k = thread % Config::kLanesK, lane_n = thread / Config::kLanesK;
    for (int64_t m0 = range.begin; m0 < range.end; m0 += Config::kDepth) {
      sync_block(); // the last step's tiles have been read
      for (int i = thread; i < Config::kDepth * Config::kSide; i += Config::kThreads) {
        const int64_t m = m0 + i / Config::kSide;
        const int64_t n = n0 + i % Config::kSide, k = k0 + i % Config::kSide;
        A g = 0, x = 0; // outside the matrix or the split: zero
        if (m < range.end && n < p.n_size) g = to_accumulator(load_global(p.g + m * p.g_stride + n));
        if (m < range.end && k < p.k_size) x = to_accumulator(load_global(p.x + m * p.x_stride + k));
        g_s[i] = g;
        x_s[i] = x;
      }
      sync_block();
      SPARSENET_UNROLL
      for (int m = 0; m < Config::kDepth; ++m) {
        A g[Config::kThreadN], x[Config::kThreadK];
        SPARSENET_UNROLL
        for (int i = 0; i < Config::kThreadN; ++i) g[i] = g_s[m * Config::kSide + lane_n + i * Config::kLanesN];
        SPARSENET_UNROLL
        for (int j = 0; j < Config::kThreadK; ++j) x[j] = x_s[m * Config::kSide + lane_k + j * Config::kLanesK];
        SPARSENET_UNROLL
        for (int i = 0; i < Config::kThreadN; ++i) {
          SPARSENET_UNROLL
          for (int j = 0; j < Config::kThreadK; ++j) sums[i][j] += g[i] * x[j];
        }
      }
    }
  }
};

template <typename T, typename Config>
SPARSENET_KERNEL(Config::kThreads)
grad_weight_simt_kernel(const GradWeight<T> p) {
  const int b = p.block_size;
  const uint32_t slabs = static_cast<uint32_t>(b) / Config::kSide, num_places = static_cast<uint32_t>(p.num_places);
  const auto cta = static_cast<uint32_t>(block_index());
  const int k_in_block = static_cast<int>(cta % slabs) * Config::kSide;
  const int n_in_block = static_cast<int>(cta / slabs % slabs) * Config::kSide;
  const int64_t place = cta / slabs / slabs % num_places;
  const int split = static_cast<int>(cta / slabs / slabs / num_places);

  GradWeightTile<T, Config> tile;
  tile.accumulate(p, static_cast<int64_t>(load_global(p.place_rows + place)) * b + n_in_block,
                  static_cast<int64_t>(load_global(p.place_cols + place)) * b + k_in_block,
                  batch_range(p.batch, split, p.splits));
  const int lane_k = thread_index() % Config::kLanesK, lane_n = thread_index() / Config::kLanesK;
  SPARSENET_UNROLL
  for (int i = 0; i < Config::kThreadN; ++i) {
    SPARSENET_UNROLL
    for (int j = 0; j < Config::kThreadK; ++j) {
      const int n = n_in_block + lane_n + i * Config::kLanesN, k = k_in_block + lane_k + j * Config::kLanesK;
      write_gradient(p, split, (place * b + n) * b + k, tile.sums[i][j]);
    }
  }
}

struct GradWeightSmallConfig {
  static constexpr int kThreads = 128;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kMostElements = 2; // of an 8 x 8 block, per lane
};

template <typename T>
SPARSENET_KERNEL(GradWeightSmallConfig::kThreads)
grad_weight_small_simt_kernel(const GradWeight<T> p) {
  using A = Accumulator<T>;
  const int b = p.block_size, elements = b * b;
  const int64_t warp = block_index() * GradWeightSmallConfig::kWarps + warp_index();
  if (warp >= p.num_places * p.splits) return; // whole warps: the shuffles below stay complete
  const int64_t place = warp % p.num_places;
  const int split = static_cast<int>(warp / p.num_places);
  const BatchRange range = batch_range(p.batch, split, p.splits);
  // b = 1: 32 lanes share the batch; b = 4: two; b = 8: each lane has two elements.
  const int element_lanes = elements < 32 ? elements : 32, batch_lanes = 32 / element_lanes;
  const int element = lane_index() % element_lanes, batch_lane = lane_index() / element_lanes;
  const int64_t row = load_global(p.place_rows + place), column = load_global(p.place_cols + place);

  SPARSENET_UNROLL
  for (int part = 0; part < GradWeightSmallConfig::kMostElements; ++part) {
    const int e = element + part * 32;
    if (part * 32 >= elements) continue;
    const int64_t n = row * b + e / b, k = column * b + e % b;
    A sum = 0;
    if (n < p.n_size && k < p.k_size)
      for (int64_t m = range.begin + batch_lane; m < range.end; m += batch_lanes)
        sum += to_accumulator(load_global(p.g + m * p.g_stride + n)) *
               to_accumulator(load_global(p.x + m * p.x_stride + k));
    for (int distance = 16; distance >= element_lanes; distance /= 2) sum += shuffle_xor(sum, distance);
    if (batch_lane == 0) write_gradient(p, split, place * elements + e, sum);
  }
}

template <typename T, int kSide>
void launch_grad_weight_tiles(const GradWeight<T>& p, Stream stream) {
  using Config = GradWeightTileConfig<kSide>;
  const int64_t slabs = p.block_size / kSide;
  launch("grad_weight_simt", grad_weight_simt_kernel<T, Config>,
         {.ctas = slabs * slabs * p.num_places * p.splits,
          .threads = Config::kThreads,
          .shared_bytes = static_cast<int64_t>(2 * sizeof(Accumulator<T>)) * Config::kDepth * kSide},
         stream, p);
}

template <typename T>
void launch_grad_weight_simt(const GradWeight<T>& p, Stream stream) {
  if (p.block_size < 16)
    launch("grad_weight_small_simt", grad_weight_small_simt_kernel<T>,
           {.ctas = ceil_div(p.num_places * p.splits, GradWeightSmallConfig::kWarps),
            .threads = GradWeightSmallConfig::kThreads},
           stream, p);
  else if (p.block_size == 16)
    launch_grad_weight_tiles<T, 16>(p, stream);
  else if (p.block_size == 32)
    launch_grad_weight_tiles<T, 32>(p, stream);
  else
    launch_grad_weight_tiles<T, 64>(p, stream);
  if (p.partials != nullptr) launch_reduce_splits(p, stream);
}

} // namespace sparsenet::cuda
