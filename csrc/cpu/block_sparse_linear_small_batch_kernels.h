// The inner loops of block_sparse_linear_small_batch.h, which explains them: some blocks of values times a chunk of
// rows. The names say how vectors of values lie in a block:
//
//   across_run      forward      a vector holds one input of `lanes` outputs: down the rows of a block
//   broadcast_run   forward      a value is broadcast to a vector of rows of x
//   along_blocks    grad_input   a vector holds `lanes` inputs of one output: along a row of a block
//   outer_block     grad_weight  the same, written instead of read
#pragma once

#include "dispatch.h"

namespace sparsenet::cpu::SPARSENET_ISA {
namespace {

constexpr int64_t kFetchBytes = int64_t(1) << 13;

template <typename S, int64_t B> constexpr int64_t kBlockBytes = B * B * int64_t(sizeof(S));

// Consecutive blocks of a block row, from `first` on: entry i reads x block features[i].
struct SmallRun {
  const int32_t* features;
  int64_t first, count;
};

// Blocks of some block columns, in the order of memory.
struct SmallBlocks {
  const int32_t* list; // their numbers
  int64_t count;
  int64_t available;        // entries readable from here on, for fetching; at least count
  const int32_t *row, *col; // of every block
};

// A square of values, kLanes rows of B from w on, as vectors across the rows; where a row of pairs is half a vector,
// the first half of the square.
template <class P, int B, typename S>
SPARSENET_INLINE void load_across(const S* w, Vec<typename P::Packed>* square) {
  constexpr int lanes = kLanes<typename P::Packed>;
  if constexpr (P::kDepth == 1) {
#pragma GCC unroll 16
    for (int r = 0; r < lanes; ++r) square[r] = load_wide(w + r * B);
    transpose(square);
  } else {
#if defined(__AVX512BF16__)
  #pragma GCC unroll 16
    for (int r = 0; r < lanes; ++r) {
      if constexpr (B / P::kDepth >= lanes) {
        square[r] = load(reinterpret_cast<const uint32_t*>(w + r * B));
      } else {
        square[r] = (Vec<uint32_t>)_mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i*)(w + r * B)));
      }
    }
    transpose(square);
#endif
  }
}

// tile [M][B] += one run of a block row times x [feature block][M][B / depth].
template <class P, typename S, int B, int M>
void across_run(const SmallRun& run, const S* values, const typename P::Packed* x, float* tile) {
  constexpr int lanes = kLanes<float>, depth = B / P::kDepth, square_depth = depth < lanes ? depth : lanes;
  constexpr int64_t square_bytes = lanes * square_depth * P::kDepth * int64_t(sizeof(S));
  const S* w = values + run.first * B * B;
  Vec<float> acc[M];
  for (int64_t i = 0; i < run.count; ++i) {
    const typename P::Packed* xb = x + int64_t(run.features[i]) * M * depth;
    for (int n = 0; n < B; n += lanes, w += lanes * B) {
      if (B > lanes || i == 0)
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) acc[m] = load(tile + m * B + n);
      const char* next = reinterpret_cast<const char*>(w) + kFetchBytes;
      for (int k = 0; k < depth; k += square_depth) {
#pragma GCC unroll 16
        for (int64_t at = 0; at < square_bytes; at += kLineBytes) __builtin_prefetch(next + at, 0, 2);
        next += square_bytes;
        Vec<typename P::Packed> wv[lanes];
        load_across<P, B>(w + k * P::kDepth, wv);
#pragma GCC unroll 16
        for (int j = 0; j < square_depth; ++j)
#pragma GCC unroll 16
          for (int m = 0; m < M; ++m) acc[m] = P::multiply_add(acc[m], xb[m * depth + k + j], wv[j]);
      }
      if (B > lanes || i + 1 == run.count)
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) store(tile + m * B + n, acc[m]);
    }
  }
}

// tile [B][lanes] += the same for as many rows of x as there are lanes, which lie as [feature / depth][lanes].
template <class P, typename S, int B>
void broadcast_run(const SmallRun& run, const S* values, const typename P::Packed* x, float* tile) {
  using T = typename P::Packed;
  constexpr int M = kLanes<float>, rows = kVectorBytes == 64 ? 16 : 8, depth = B / P::kDepth;
  static_assert(sizeof(S) * P::kDepth == sizeof(T), "a weight is broadcast from where it is");
  const T* w = reinterpret_cast<const T*>(values) + run.first * B * depth;
  Vec<float> acc[rows];
  for (int64_t i = 0; i < run.count; ++i) {
    const T* xb = x + int64_t(run.features[i]) * depth * M;
    for (int n = 0; n < B; n += rows, w += rows * depth) {
      if (B > rows || i == 0)
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) acc[r] = load(tile + (n + r) * M);
      const char* next = reinterpret_cast<const char*>(w) + kFetchBytes;
#pragma GCC unroll 4
      for (int k = 0; k < depth; ++k) {
        if (k % (kLineBytes / rows / int(sizeof(T))) == 0) {
          __builtin_prefetch(next, 0, 2);
          next += kLineBytes;
        }
        const Vec<T> xv = load(xb + k * M);
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) acc[r] = P::multiply_add(acc[r], w[r * depth + k], xv);
      }
      if (B > rows || i + 1 == run.count)
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) store(tile + (n + r) * M, acc[r]);
    }
  }
}

// kLanes weights [k, k + lanes) of row n, or of the pair of rows n and n + 1.
template <class P, int B, typename S> SPARSENET_INLINE Vec<typename P::Packed> load_along(const S* w) {
  if constexpr (P::kDepth == 1) {
    return load_wide(w);
  } else {
#if defined(__AVX512BF16__)
    alignas(64) static constexpr uint16_t kPairs[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i rows = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)w)),
                                            _mm256_loadu_si256((const __m256i*)(w + B)), 1);
    return (Vec<uint32_t>)_mm512_permutexvar_epi16(_mm512_load_si512(kPairs), rows);
#endif
  }
}

// tiles [block column][M][B] += the blocks of a list times dz [block row][M][B / depth].
template <class P, typename S, int B, int M>
void along_blocks(const SmallBlocks& blocks, const S* values, const typename P::Packed* z, float* tiles) {
  constexpr int lanes = kLanes<float>, vectors = B / lanes < lanes / M ? B / lanes : lanes / M, width = vectors * lanes;
  constexpr int depth = B / P::kDepth;
  constexpr int64_t ahead = kBlockBytes<S, B> < kFetchBytes ? kFetchBytes / kBlockBytes<S, B> : 1;
  for (int64_t i = 0; i < blocks.count; ++i) {
    const int64_t block = blocks.list[i], later = blocks.list[i + ahead < blocks.available ? i + ahead : i];
    const typename P::Packed* zb = z + blocks.row[block] * int64_t(M) * depth;
    float* const tile = tiles + blocks.col[block] * int64_t(M) * B;
    const int64_t following = blocks.list[i + 1 < blocks.available ? i + 1 : i];
    const float* const next_tile = tiles + blocks.col[following] * int64_t(M) * B; // to be fetched from L2
    for (int k = 0; k < B; k += width) {
      const S* w = values + block * B * B + k;
      const S* next = values + later * B * B + k;
      Vec<float> acc[M][vectors];
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
        for (int v = 0; v < vectors; ++v) acc[m][v] = load(tile + m * B + k + v * lanes);
#pragma GCC unroll 2
      for (int n = 0; n < depth; ++n) {
#pragma GCC unroll 2
        for (int row = 0; row < P::kDepth; ++row)
#pragma GCC unroll 8
          for (int64_t at = 0; at < width; at += kLineBytes / int64_t(sizeof(S)))
            __builtin_prefetch(next + (n * P::kDepth + row) * B + at, 0, 2);
        if (n < M * vectors) __builtin_prefetch(next_tile + n / vectors * B + k + n % vectors * lanes, 0, 3);
        Vec<typename P::Packed> wv[vectors];
#pragma GCC unroll 16
        for (int v = 0; v < vectors; ++v) wv[v] = load_along<P, B>(w + n * P::kDepth * B + v * lanes);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
          for (int v = 0; v < vectors; ++v) acc[m][v] = P::multiply_add(acc[m][v], zb[m * depth + n], wv[v]);
      }
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
        for (int v = 0; v < vectors; ++v) store(tile + m * B + k + v * lanes, acc[m][v]);
    }
  }
}

template <class P, typename S>
using RunKernel = void (*)(const SmallRun&, const S* values, const typename P::Packed* x, float* tile);
template <class P, typename S>
using BlocksKernel = void (*)(const SmallBlocks&, const S* values, const typename P::Packed* z, float* tiles);

// Whether forward at this width has a lane for each row of the chunk.
template <class P, typename S> constexpr bool has_lane_per_row(int64_t width) {
  return width == kLanes<float> && sizeof(S) * P::kDepth == sizeof(typename P::Packed);
}

// Most rows of a chunk, in forward and in grad_input.
template <class P, typename S>
constexpr int64_t kForwardRows = kVectorBytes == 64 && has_lane_per_row<P, S>(16) ? 16 : 8;
constexpr int64_t kGradInputRows = kVectorBytes == 64 ? 16 : 8;

template <class P, typename S, int B, int M> constexpr RunKernel<P, S> run_kernel() {
  if constexpr (M > kForwardRows<P, S>) {
    return nullptr;
  } else if constexpr (has_lane_per_row<P, S>(M)) {
    return broadcast_run<P, S, B>;
  } else {
    return across_run<P, S, B, M>;
  }
}
template <class P, typename S, int B, int M> constexpr BlocksKernel<P, S> blocks_kernel() {
  if constexpr (M > kGradInputRows) {
    return nullptr;
  } else {
    return along_blocks<P, S, B, M>;
  }
}

// find<B, M>() for a block size and a width known now.
template <class Find> auto with_block_and_width(int64_t b, int64_t width, const Find& find) {
  return with_block_size<16, 128>(
      b, [&]<int B>() { return with_chunk_width(width, [&]<int M>() { return find.template operator()<B, M>(); }); });
}
template <class P, typename S> RunKernel<P, S> run_kernel_for(int64_t b, int64_t width) {
  return with_block_and_width(b, width, []<int B, int M>() { return run_kernel<P, S, B, M>(); });
}
template <class P, typename S> BlocksKernel<P, S> blocks_kernel_for(int64_t b, int64_t width) {
  return with_block_and_width(b, width, []<int B, int M>() { return blocks_kernel<P, S, B, M>(); });
}

// out [B][B] = the outer products of z [batch][B] and x [batch][B], summed over the batch.
template <typename S, int B> void outer_block(const float* z, const float* x, int64_t batch, S* out) {
  constexpr int lanes = kLanes<float>, vectors = B > lanes ? 2 : 1;
  constexpr int rows = kVectorBytes == 64 ? 16 / vectors : 4;
  const bool fetches = batch > 2; // with little but stores the processor sees the stream itself
  for (int n = 0; n < B; n += rows)
    for (int k = 0; k < B; k += vectors * lanes) {
      Vec<float> acc[rows][vectors] = {};
      for (int64_t m = 0; m < batch; ++m) {
        Vec<float> xv[vectors];
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) xv[v] = load(x + m * B + k + v * lanes);
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
          const Vec<float> zv = broadcast(z[m * B + n + r]);
#pragma GCC unroll 2
          for (int v = 0; v < vectors; ++v) acc[r][v] += zv * xv[v];
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) {
          S* const to = out + (n + r) * B + k + v * lanes;
          if (fetches) __builtin_prefetch(reinterpret_cast<const char*>(to) + kFetchBytes, 1, 2);
          store_narrow(to, acc[r][v]);
        }
    }
}

template <typename S> using OuterKernel = void (*)(const float* z, const float* x, int64_t batch, S* out);

template <typename S> OuterKernel<S> outer_kernel_for(int64_t b) {
  return with_block_size<16, 128>(b, []<int B>() -> OuterKernel<S> { return outer_block<S, B>; });
}

} // namespace
} // namespace sparsenet::cpu::SPARSENET_ISA
