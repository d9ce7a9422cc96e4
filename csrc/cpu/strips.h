// Strips: one operand of a weight gradient in the order in which the sums of block_sparse_linear_grad_weight.h and of
// the norms read it.
//
//   strip s [row / depth][width]: columns [s * width, (s + 1) * width) of x (or grad_z) in one panel of rows of the
//   batch, zeros outside the matrix. Blocks wider than kStripWidth are cut into squares of that width: from there on
//   all block sizes run at one rate. Blocks narrower than a vector lie feature by feature instead, [width][row].
#pragma once

#include "dispatch.h"
#include "tile.h"

namespace sparsenet::cpu::SPARSENET_ISA {
namespace {

constexpr int64_t kStripWidth = 32;
constexpr int64_t kChunkBytes = int64_t(8) << 10; // of a strip: stays in L1 over all output groups

template <typename T> constexpr bool is_narrow(int64_t block) { return block < kLanes<T>; }

template <class P> struct Strips {
  using T = typename P::Packed;
  T* data;
  int64_t width; // min(block size, kStripWidth)
  int64_t rows;  // of a panel, a multiple of 16

  // Panels of 2^n rows would put all strips (or features) into the same cache sets: each is one line longer.
  static constexpr int64_t kPad = kLineBytes / int64_t(sizeof(T));
  int64_t feature_stride() const { return rows + kPad; } // of narrow ones
  int64_t stride() const { return is_narrow<T>(width) ? width * feature_stride() : width * (rows / P::kDepth) + kPad; }
  int64_t elements(int64_t count) const { return count * stride(); }
  int64_t bytes(int64_t count) const { return elements(count) * int64_t(sizeof(T)); }
  T* strip(int64_t s) const { return data + s * stride(); }
};

SPARSENET_INLINE int64_t strip_width(int64_t block) { return min_of(block, kStripWidth); }

// What of a source lies in a panel: columns [0, features) of rows [first_row, batch), as far as the strips reach.
struct Panel {
  int64_t features, batch, first_row;
};

// Packs `count` strips of a panel; strips outside the matrix become zero. Those that `needed` marks 0 may be left alone
// (null: all are needed). Adds the column sums to bias_sum [features] where it is not null.
template <class P, Activation A, typename S>
void pack_strips(const Rows<S>& source, const Strips<P>& strips, int64_t count, const Panel& panel,
                 const char* needed = nullptr, Compute<S>* bias_sum = nullptr) {
  using C = Compute<S>;
  const auto [features, batch, begin] = panel;
  const int64_t rows = strips.rows, row_end = min_of(batch, begin + rows), width = strips.width;
  const int64_t inside = max_of(0, min_of(count, ceil_div(features, width))), wanted = min_of(features, inside * width);
  memset(static_cast<void*>(strips.strip(inside)), 0, size_t(strips.bytes(count - inside)));
  if (!is_narrow<C>(width))
    return pack_rows<P, A>(source, begin, row_end, begin + rows, wanted, width, needed, strips.data, strips.stride(),
                           bias_sum);
  if constexpr (P::kDepth == 1) {
    for (int64_t f = 0; f < wanted; f += kLanes<C>) { // what is transposed together: a whole number of strips
      const int64_t here = min_of(kLanes<C>, wanted - f), some = ceil_div(here, width);
      if (needed != nullptr && memchr(needed + f / width, 1, size_t(some)) == nullptr) continue;
      pack_features<P, A>(columns_from(source, f), begin, row_end, here, some * width, rows, strips.feature_stride(),
                          strips.strip(f / width));
    }
    for (int64_t f = 0; bias_sum != nullptr && f < wanted; ++f) {
      Vec<C> sum = {};
      for (int64_t m = 0; m < rows; m += kLanes<C>) sum += load(strips.data + f * strips.feature_stride() + m);
      bias_sum[f] += sum_lanes(sum);
    }
  }
}

// acc0 [W][W] += g^T x0 over `rows` packed rows; strips of one vector take two x at a time: acc1 += g^T x1.
template <class P, int W>
void sum_strips(const typename P::Packed* g, const typename P::Packed* x0, const typename P::Packed* x1, int64_t rows,
                FetchQueue& fetch, typename P::Accumulator* acc0, typename P::Accumulator* acc1) {
  constexpr int lanes = kLanes<typename P::Packed>, outputs = kRegisters == 32 ? 8 : 4;
  constexpr int64_t chunk = kChunkBytes / (W * int64_t(sizeof(*x0)));
  static_assert(W % outputs == 0 && W % lanes == 0, "a strip is whole groups of outputs and whole vectors");
  for (int64_t m = 0; m < rows; m += chunk) {
    const int64_t count = min_of(chunk, rows - m);
    for (int output = 0; output < W; output += outputs) {
      const auto* w = g + m * W + output;
      if constexpr (W == lanes) {
        outer_products<P, outputs>(w, {W, 1}, x0 + m * W, x1 + m * W, W, count, fetch, acc0 + output * W,
                                   acc1 + output * W, W);
      } else {
        for (int k = 0; k < W; k += 2 * lanes)
          outer_products<P, outputs>(w, {W, 1}, x0 + m * W + k, x0 + m * W + k + lanes, W, count, fetch,
                                     acc0 + output * W + k, acc0 + output * W + k + lanes, W);
      }
    }
  }
}

// acc [blocks_together(B)][B][B] += the same for strips that lie feature by feature, `stride` apart: one of g, and one
// of x for each block.
template <typename T, int B>
void sum_features(const T* g, const T* const* strips, int64_t stride, int64_t rows, T* acc) {
  constexpr int lanes = kLanes<T>, cols = B == 1 ? lanes : 4, out_rows = lanes / cols;
  static_assert(B == 1 || B % out_rows == 0, "a block is whole pieces");
  for (int i = 0; i < B; i += out_rows)
    for (int j = 0; j < B; j += cols) {
      const T* x[cols];
      for (int k = 0; k < cols; ++k) x[k] = B == 1 ? strips[k] : strips[0] + (j + k) * stride;
      const Vec<T> found = dot_products<T, out_rows, cols>(g + i * stride, stride, x, rows);
      if constexpr (cols == B || B == 1) { // they lie side by side
        store(acc + i * B, load(acc + i * B) + found);
      } else {
        T sums[lanes];
        store(sums, found);
        for (int k = 0; k < lanes; ++k) acc[(i + k / cols) * B + j + k % cols] += sums[k];
      }
    }
}

template <class P>
using SumStrips = void (*)(const typename P::Packed*, const typename P::Packed*, const typename P::Packed*, int64_t,
                           FetchQueue&, typename P::Accumulator*, typename P::Accumulator*);

template <class P> SumStrips<P> sum_strips_of(int64_t width) {
  constexpr int lanes = kLanes<typename P::Packed>;
  return with_block_size<max_of(lanes, 4), kStripWidth>(width,
                                                        []<int W>() -> SumStrips<P> { return sum_strips<P, W>; });
}

template <typename T> using SumFeatures = void (*)(const T*, const T* const*, int64_t, int64_t, T*);

template <typename T> SumFeatures<T> sum_features_of(int64_t block) {
  return with_block_size<1, kLanes<T> / 2>(block, []<int B>() -> SumFeatures<T> { return sum_features<T, B>; });
}

// How many blocks of a block row it takes at once: single elements fill a vector together.
template <typename T> int64_t blocks_together(int64_t block) {
  return with_block_size<1, kLanes<T> / 2>(block, []<int B>() -> int64_t { return B == 1 ? kLanes<T> : 1; });
}

} // namespace
} // namespace sparsenet::cpu::SPARSENET_ISA
