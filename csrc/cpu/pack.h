// Packing: the operands of the block kernels in the order in which they are read.
//
//   features  [feature / depth][row] of one tile of rows: a vector holds one feature (or a pair, for bfloat16 dot
//             products) of kLanes consecutive rows of the batch. Forward and grad_input read it.
//   rows      [feature block][row / depth][feature in block]: a vector holds kLanes consecutive features of one row (or
//             row pair). grad_weight reads it.
//
// What lies outside the matrix is packed as zero, so kernels know no edges.
#pragma once

#include "activation.h"

namespace sparsenet::cpu::SPARSENET_ISA {
namespace {

// How operands are held while computing: element by element in T, or (AVX512-BF16) as pairs of bfloat16 in 32 bits.
template <typename T> struct Single {
  using Packed = T;
  using Accumulator = T;
  static constexpr int kDepth = 1;
  SPARSENET_INLINE static Vec<T> multiply_add(Vec<T> acc, T weight, Vec<T> x) { return acc + broadcast(weight) * x; }
};
struct Pair;
#if defined(__AVX512BF16__)
template <typename S> constexpr bool kHasPairs = sizeof(S) == sizeof(BFloat16); // the only type of its size here
struct Pair {
  using Packed = uint32_t;
  using Accumulator = float;
  static constexpr int kDepth = 2;
  SPARSENET_INLINE static Vec<float> multiply_add(Vec<float> acc, uint32_t weights, Vec<uint32_t> x) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(int(weights)), (__m512bh)x);
  }
};
#else
template <typename S> constexpr bool kHasPairs = false;
#endif

// A gradient before its activation, row by row: grad_y * activation'(saved); with Activation::none just the matrix.
template <typename S> struct Rows {
  const S* data;
  int64_t stride;
  const S* saved; // same shape and meaning as LinearBackward::saved; null with Activation::none
  int64_t saved_stride;

  template <Activation A> SPARSENET_INLINE Vec<Compute<S>> load_at(int64_t row, int64_t col, int64_t count) const {
    const auto v = load_wide(data + row * stride + col, count);
    if constexpr (A == Activation::none) {
      return v;
    } else {
      return activation_gradient<A>(v, load_wide(saved + row * saved_stride + col, count));
    }
  }
};

template <typename S> Rows<S> rows_of(const Matrix& m) { return {static_cast<const S*>(m.data), m.stride, nullptr, 0}; }

template <typename S> Rows<S> columns_from(Rows<S> rows, int64_t first) {
  rows.data += first;
  if (rows.saved != nullptr) rows.saved += first;
  return rows;
}

#if defined(__AVX512BF16__)
// Two vectors of consecutive features -> pairs (2i, 2i+1) of bfloat16.
SPARSENET_INLINE Vec<uint32_t> to_pairs(Vec<float> low, Vec<float> high) {
  HalfVector halves[2] = {round_to_bfloat16(low), round_to_bfloat16(high)};
  Vec<uint32_t> pairs;
  memcpy(&pairs, halves, sizeof(pairs));
  return pairs;
}
#endif

// One vector of packed features [feature, feature + kLanes * depth) of one row.
template <class P, Activation A, typename S>
SPARSENET_INLINE Vec<typename P::Packed> packed_row(const Rows<S>& source, int64_t row, int64_t feature,
                                                    int64_t features) {
  constexpr int lanes = kLanes<typename P::Packed>;
  if constexpr (P::kDepth == 1) {
    return source.template load_at<A>(row, feature, features - feature);
  } else {
    if constexpr (A == Activation::none) {
      if (features - feature >= 2 * lanes)
        return load(reinterpret_cast<const uint32_t*>(source.data + row * source.stride + feature));
    }
    return to_pairs(source.template load_at<A>(row, feature, features - feature),
                    source.template load_at<A>(row, feature + lanes, max_of(0, features - feature - lanes)));
  }
}

// Rows [row_begin, row_begin + width) of source, zeros from row_end on -> out [padded_features / depth][width] with
// `stride` elements from feature to feature; width is a multiple of kLanes.
template <class P, Activation A, typename S>
void pack_features(const Rows<S>& source, int64_t row_begin, int64_t row_end, int64_t features, int64_t padded_features,
                   int64_t width, int64_t stride, typename P::Packed* out) {
  using T = typename P::Packed;
  constexpr int lanes = kLanes<T>;
  const int64_t packed_features = ceil_div(padded_features, P::kDepth);
  for (int64_t v = 0; v < width; v += lanes) { // kLanes rows are read along: few enough streams for the prefetcher
    for (int64_t at = 0; at < packed_features; at += lanes) {
      const int64_t wanted = min_of(lanes, packed_features - at);
      Vec<T> square[lanes];
      for (int i = 0; i < lanes; ++i) {
        const int64_t row = row_begin + v + i;
        square[i] = row < row_end ? packed_row<P, A>(source, row, at * P::kDepth, features) : Vec<T>{};
      }
      transpose(square);
      for (int64_t i = 0; i < wanted; ++i) store(out + (at + i) * stride + v, square[i]);
    }
  }
}

// The columns [col, col + kLanes) of kRowsAtOnce rows from `row` on -> to [row / depth][block]. Rows from row_end on
// and columns from `count` on are zero. Adds the column sums to bias_sum where it is not null.
constexpr int64_t kRowsAtOnce = 8;

template <class P, Activation A, bool kWhole, typename S>
SPARSENET_INLINE void pack_column(const Rows<S>& source, int64_t row, int64_t row_end, int64_t col, int64_t count,
                                  int64_t block, typename P::Packed* to, Compute<S>* bias_sum) {
  using C = Compute<S>;
  if constexpr (kWhole) count = kLanes<C>;
#if defined(__AVX512BF16__)
  if constexpr (P::kDepth == 2 && A == Activation::none && kWhole) { // the halves as they are
    if (bias_sum == nullptr) {
      const S* from = source.data + row * source.stride + col;
  #pragma GCC unroll 8
      for (int i = 0; i < kRowsAtOnce; i += 2, from += 2 * source.stride)
        store(to + i / 2 * block, load_halves(from) | (load_halves(from + source.stride) << 16));
      return;
    }
  }
#endif
  Vec<C> rows[kRowsAtOnce];
#pragma GCC unroll 8
  for (int i = 0; i < kRowsAtOnce; ++i)
    rows[i] = kWhole || row + i < row_end ? source.template load_at<A>(row + i, col, count) : Vec<C>{};
  if (bias_sum != nullptr) {
    Vec<C> sum = load_wide(bias_sum, count);
#pragma GCC unroll 8
    for (int i = 0; i < kRowsAtOnce; ++i) sum += rows[i];
    store_narrow(bias_sum, sum, count);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRowsAtOnce; i += P::kDepth) {
    if constexpr (P::kDepth == 1) {
      store(to + i * block, rows[i]);
    } else {
#if defined(__AVX512BF16__)
      store(to + i / 2 * block, pairs_of(rows[i], rows[i + 1]));
#endif
    }
  }
}

// Rows [row_begin, row_end) of source, cut into strips of `block` features: strip s of features goes to
// out + s * strip_stride as [row / depth][block], zeros outside the matrix, up to padded_end rows (a multiple of
// kRowsAtOnce after row_begin). Strips that `needed` marks 0 are left alone (null: all are needed). Adds the column
// sums to bias_sum [features] where it is not null.
template <class P, Activation A, typename S>
void pack_rows(const Rows<S>& source, int64_t row_begin, int64_t row_end, int64_t padded_end, int64_t features,
               int64_t block, const char* needed, typename P::Packed* out, int64_t strip_stride, Compute<S>* bias_sum) {
  constexpr int64_t lanes = kLanes<Compute<S>>;
  for (int64_t r = row_begin; r < padded_end; r += kRowsAtOnce) {
    typename P::Packed* to = out + (r - row_begin) / P::kDepth * block;
    for (int64_t f = 0, strip = 0; f < features; f += block, ++strip, to += strip_stride) {
      if (needed != nullptr && !needed[strip]) continue;
      for (int64_t c = 0; c < block; c += lanes) {
        const int64_t count = max_of(0, min_of(lanes, features - f - c));
        auto* const sum = bias_sum != nullptr ? bias_sum + f + c : nullptr;
        if (count == lanes && r + kRowsAtOnce <= row_end) {
          pack_column<P, A, true>(source, r, row_end, f + c, count, block, to + c, sum);
        } else {
          pack_column<P, A, false>(source, r, row_end, f + c, count, block, to + c, sum);
        }
      }
    }
  }
}

// acc [2 * kLanes][width] -> rows of bfloat16, transposed in pairs: half the work, and whole lines of 64 bytes.
template <typename F>
SPARSENET_INLINE void store_pairs(const float* acc, int64_t width, int64_t rows, BFloat16* y, int64_t y_stride, F act) {
  constexpr int lanes = kLanes<float>;
  Vec<uint32_t> square[lanes];
  for (int i = 0; i < lanes; ++i)
    square[i] = pairs_of(act(load(acc + 2 * i * width)), act(load(acc + (2 * i + 1) * width)));
  transpose(square);
  for (int64_t i = 0; i < rows; ++i) store(reinterpret_cast<uint32_t*>(y + i * y_stride), square[i]);
}

// Outputs that store_tile likes to have at once.
template <typename S> constexpr int kStoredTogether = kLanes<Compute<S>>;
template <> constexpr int kStoredTogether<BFloat16> = 2 * kLanes<float>;

// acc [features][width] -> rows of y (and of the pre-activation), activation applied.
template <Activation A, typename S>
void store_tile(const Compute<S>* acc, int64_t width, int64_t rows, int64_t features, S* y, int64_t y_stride,
                S* pre_activation, int64_t pre_stride) {
  using C = Compute<S>;
  constexpr int lanes = kLanes<C>;
  int64_t f = 0;
  if constexpr (kStoredTogether<S> == 2 * lanes) {
    for (; f + 2 * lanes <= features; f += 2 * lanes)
      for (int64_t v = 0; v < width && v < rows; v += lanes) {
        const C* const from = acc + f * width + v;
        const int64_t here = min_of(lanes, rows - v);
        if (pre_activation != nullptr)
          store_pairs(from, width, here, pre_activation + v * pre_stride + f, pre_stride, [](Vec<C> z) { return z; });
        store_pairs(from, width, here, y + v * y_stride + f, y_stride, [](Vec<C> z) { return activate<A>(z); });
      }
  }
  for (; f < features; f += lanes) {
    const int64_t count = min_of(lanes, features - f);
    for (int64_t v = 0; v < width && v < rows; v += lanes) {
      Vec<C> square[lanes];
      for (int i = 0; i < lanes; ++i) square[i] = i < count ? load(acc + (f + i) * width + v) : Vec<C>{};
      transpose(square);
      const int64_t rows_here = min_of(lanes, rows - v);
      for (int64_t i = 0; i < rows_here; ++i) {
        if (pre_activation != nullptr) store_narrow(pre_activation + (v + i) * pre_stride + f, square[i], count);
        store_narrow(y + (v + i) * y_stride + f, activate<A>(square[i]), count);
      }
    }
  }
}

} // namespace
} // namespace sparsenet::cpu::SPARSENET_ISA
