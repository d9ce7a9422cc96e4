// Strips: one operand of a weight gradient in the order in which the sums of block_sparse_linear_grad_weight.h and of
// the norms read it.
//
//   strip s [row / depth][width]: columns [s * width, (s + 1) * width) of x (or grad_z) in one panel of rows of the
//   batch, zeros outside the matrix. Blocks wider than kStripWidth are cut into squares of that width: from there on
//   all block sizes run at one rate. Blocks narrower than a vector lie feature by feature instead, [width][row].
#pragma once

#include "tile.h"

namespace sparsenet::cpu::SPARSENET_ISA {
namespace {

constexpr int64_t kStripWidth = 32;
constexpr int64_t kLineBytes = 64;

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
  int64_t bytes(int64_t count) const { return count * stride() * int64_t(sizeof(T)); }
  T* strip(int64_t s) const { return data + s * stride(); }
};

SPARSENET_INLINE int64_t strip_width(int64_t block) { return min_of(block, kStripWidth); }

// Packs `count` strips: columns [0, features) of rows [begin, begin + strips.rows) of source, which has `batch` rows;
// strips outside the matrix become zero. Those that `needed` marks 0 may be left alone (null: all are needed). Adds the
// column sums to bias_sum [features] where it is not null.
template <class P, Activation A, typename S>
void pack_strips(const Rows<S>& source, const Strips<P>& strips, int64_t count, int64_t features, int64_t batch,
                 int64_t begin, const char* needed, Compute<S>* bias_sum) {
  using C = Compute<S>;
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

} // namespace
} // namespace sparsenet::cpu::SPARSENET_ISA
