// The micro-kernels: everything that runs at the rate of the multiply-add units.
//
//   multiply_blocks   acc[output][row] += sum over blocks and k of w[output][k] * x[k][row]
//                     A tile of kOutputs outputs x MV vectors of rows stays in registers over a run of blocks; per k it
//                     reads MV vectors of packed x and broadcasts kOutputs weights straight from `values`, in the
//                     natural order for forward (w = values[output][k]) and across it for grad_input
//                     (values[k][output]). The weights need no packing, and the code is the same for every block size.
//   outer_products    acc[output][k] += sum over rows of g[row][output] * x[row][k]: rank-1 updates, for blocks at
//                     least one vector wide.
//   dot_products      the same sums for narrower blocks, as dot products along the rows of feature-packed operands: a
//                     part of a block, or a few blocks of one element beside each other.
#pragma once

#include "fetch.h"
#include "pack.h"

namespace sparsenet::cpu::SPARSENET_ISA {
namespace {

// Tile constants for blocks of B x B. Accumulators, x vectors and one broadcast weight must fit in the registers.
template <int B> struct TileConfig {
  static constexpr int kOutputs = kRegisters == 32 ? (B < 8 ? B : 8) : (B < 4 ? B : 4);
  static constexpr int kMaxVectors = B == 1 ? 8 : (kRegisters == 32 && B == 4) ? 6 : 3;
  static constexpr int kRunBlocks = B <= kOutputs ? 1 << 30 : (128 / B > 1 ? 128 / B : 1); // x of a run stays in L1
  static_assert(B == 1 || kOutputs * kMaxVectors + kMaxVectors + 1 <= kRegisters, "the tile must fit in registers");
  static_assert(B % kOutputs == 0, "a block is a whole number of output groups");
};

// Which blocks one run multiplies: entry i reads x block features[i] and weight block blocks[i] (or first + i).
struct BlockRun {
  const int32_t* features;
  const int32_t* blocks; // null: consecutive from `first`
  int64_t first;
  int64_t count;
  int64_t available; // entries readable from here on, for prefetching; at least count
  int64_t block(int64_t i) const { return blocks != nullptr ? blocks[i] : first + i; }
};

template <class P, int B, int MV, bool kTransposed>
SPARSENET_INLINE void multiply_run(const typename P::Packed* x, const typename P::Packed* values, const BlockRun& run,
                                   int first_output, FetchQueue& fetch, typename P::Accumulator* acc) {
  using T = typename P::Packed;
  using C = typename P::Accumulator;
  constexpr int lanes = kLanes<T>, outputs = TileConfig<B>::kOutputs, width = MV * lanes;
  constexpr int depth = B / P::kDepth; // steps of k per block
  constexpr int64_t block_elements = int64_t(B) * depth;
  static_assert(!kTransposed || P::kDepth == 1, "pairs lie along a row of values: transpose them first");
  Vec<C> c[outputs][MV];
#pragma GCC unroll 16
  for (int r = 0; r < outputs; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < MV; ++v) c[r][v] = load(acc + r * width + v * lanes);
  for (int64_t i = 0; i < run.count; ++i) {
    const T* xb = x + int64_t(run.features[i]) * depth * width;
    const T* wb = values + run.block(i) * block_elements + (kTransposed ? first_output : first_output * depth);
    constexpr int64_t ahead = TileConfig<B>::kRunBlocks < 64 ? TileConfig<B>::kRunBlocks : 1;
    const char* next = reinterpret_cast<const char*>(
        values + run.block(i + ahead < run.available ? i + ahead : i) * block_elements + first_output * depth);
    const auto step = [&](int k) __attribute__((always_inline)) {
      Vec<T> xv[MV];
#pragma GCC unroll 16
      for (int v = 0; v < MV; ++v) xv[v] = load(xb + k * width + v * lanes);
#pragma GCC unroll 16
      for (int r = 0; r < outputs; ++r) {
        const T w = kTransposed ? wb[k * B + r] : wb[r * depth + k];
#pragma GCC unroll 16
        for (int v = 0; v < MV; ++v) c[r][v] = P::multiply_add(c[r][v], w, xv[v]);
      }
    };
    if constexpr (depth < 4) {
      for (int k = 0; k < depth; ++k) step(k);
    } else {
      Lines lines = fetch.take();
      for (int k = 0; k < depth; k += 4) {
        __builtin_prefetch(next + k * outputs * int(sizeof(T)), 0, 3);
        step(k);
        step(k + 1);
        __builtin_prefetch(next + (k + 2) * outputs * int(sizeof(T)), 0, 3);
        FetchQueue::fetch_one(lines);
        step(k + 2);
        step(k + 3);
      }
      fetch.give_back(lines);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < outputs; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < MV; ++v) store(acc + r * width + v * lanes, c[r][v]);
}

// One block row: acc [B][MV * lanes] += its blocks times x.
template <class P, int B, int MV, bool kTransposed>
void multiply_blocks(const typename P::Packed* x, const typename P::Packed* values, BlockRun run, FetchQueue& fetch,
                     typename P::Accumulator* acc) {
  constexpr int width = MV * kLanes<typename P::Packed>;
  for (int64_t left = run.count; left > 0; left -= TileConfig<B>::kRunBlocks) {
    run.count = min_of(left, TileConfig<B>::kRunBlocks);
    for (int output = 0; output < B; output += TileConfig<B>::kOutputs)
      multiply_run<P, B, MV, kTransposed>(x, values, run, output, fetch, acc + output * width);
    run.features += run.count;
    if (run.blocks != nullptr) run.blocks += run.count;
    run.first += run.count;
    run.available -= run.count;
  }
}

// How outer_products reads g: `step` elements from row to row, `output` from output to output.
struct Strides {
  int64_t step, output;
};

// acc[output][vector] += g[row][output] * x_v[row]: `outputs` columns of g, two vectors of x from two addresses.
template <class P, int kOutputs>
SPARSENET_INLINE void outer_products(const typename P::Packed* g, Strides g_strides, const typename P::Packed* x0,
                                     const typename P::Packed* x1, int64_t stride, int64_t rows, FetchQueue& fetch,
                                     typename P::Accumulator* acc0, typename P::Accumulator* acc1, int64_t acc_stride) {
  using T = typename P::Packed;
  Vec<typename P::Accumulator> c[kOutputs][2];
#pragma GCC unroll 16
  for (int r = 0; r < kOutputs; ++r) {
    c[r][0] = load(acc0 + r * acc_stride);
    c[r][1] = load(acc1 + r * acc_stride);
  }
  const auto step = [&](int64_t m) __attribute__((always_inline)) {
    const Vec<T> a = load(x0 + m * stride), b = load(x1 + m * stride);
#pragma GCC unroll 16
    for (int r = 0; r < kOutputs; ++r) {
      const T w = g[m * g_strides.step + r * g_strides.output];
      c[r][0] = P::multiply_add(c[r][0], w, a);
      c[r][1] = P::multiply_add(c[r][1], w, b);
    }
  };
  Lines lines = fetch.take(), to_l2 = fetch.to_l2;
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4) {
    FetchQueue::fetch_one(lines);
    step(m);
    FetchQueue::fetch_one<2>(to_l2);
    step(m + 1);
    FetchQueue::fetch_one(lines);
    step(m + 2);
    FetchQueue::fetch_one<2>(to_l2);
    step(m + 3);
  }
  for (; m < rows; ++m) step(m);
  fetch.give_back(lines);
  fetch.to_l2 = to_l2;
#pragma GCC unroll 16
  for (int r = 0; r < kOutputs; ++r) {
    store(acc0 + r * acc_stride, c[r][0]);
    store(acc1 + r * acc_stride, c[r][1]);
  }
}

// Lane i * kCols + j of the result: sum over `rows` rows of g[i][row] * x[j][row], for kRows rows of g, `stride` apart,
// and kCols of x. As many sums as a vector has lanes: their lanes are added up together.
template <typename T, int kRows, int kCols>
SPARSENET_INLINE Vec<T> dot_products(const T* g, int64_t stride, const T* const (&x)[kCols], int64_t rows) {
  constexpr int lanes = kLanes<T>;
  static_assert(kRows * kCols == lanes, "one sum for each lane");
  Vec<T> c[lanes] = {};
  for (int64_t m = 0; m < rows; m += lanes) {
    if constexpr (kRows == 1) {
      const Vec<T> gv = load(g + m);
#pragma GCC unroll 16
      for (int j = 0; j < kCols; ++j) c[j] += gv * load(x[j] + m);
    } else { // x stays in registers for all rows of g
      Vec<T> xv[kCols];
#pragma GCC unroll 4
      for (int j = 0; j < kCols; ++j) xv[j] = load(x[j] + m);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        const Vec<T> gv = load(g + i * stride + m);
#pragma GCC unroll 4
        for (int j = 0; j < kCols; ++j) c[i * kCols + j] += gv * xv[j];
      }
    }
  }
  return sum_each(c);
}

} // namespace
} // namespace sparsenet::cpu::SPARSENET_ISA
