// All passes of block_sparse_linear for batches of up to kSmallBatch rows. The values come from memory once and decide
// the time, so they are read in place and the arithmetic is arranged to keep up with memory.
//
//   forward       acc[m][n : n + lanes] += x[m][k] * values[n : n + lanes][k], along a block row. The vectors that run
//                 across the rows of a block are made in registers, a square of lanes x lanes values transposed at a
//                 time: four shuffles a vector, whatever the batch. With a lane for every row of x they are not
//                 needed: acc[n][all m] += values[n][k] * x[all m][k].
//   grad_input    acc[m][k : k + lanes] += dz[m][n] * values[n][k : k + lanes], block by block; the sums of all block
//                 columns of a thread are kept meanwhile, in L2.
//   grad_weight   out[n][k : k + lanes] = sum over m of dz[m][n] * x[m][k : k + lanes], written once, in order.
//
//   values  [..block..][..block..][..block..]  ->  in the order of memory, each line fetched kFetchBytes ahead
//              |  square of lanes x lanes, in registers                x, dz  [feature block][M][b], in L1 and L2
//              v
//           acc [M rows] x [lanes outputs], in registers over a block row (forward) or a block (grad_input)
//
// Every sum of forward and grad_input runs in the order of larger batches, so a row's result does not depend on its
// batch. x and dz are packed once by all threads together; a block's share of them is one piece and lies in L1. M is a
// power of two, and what is too much for the registers is two chunks that take turns on a run of values while it is in
// L2.
//
// Bytes for each output (of forward y[m][n], with d the density, K the inputs and s the size of an element):
//   d K s / M of values, which is nearly all of it, and s of y. grad_weight: s for each element that it writes, and
//   another s where the line is fetched first (from 3 rows on).
//
// Measured: of the rate of a plain copy, 2 threads of an AMD EPYC (Zen 4) with AVX-512, whole calls from Python,
// 4096 x 4096, 10 % density, b = 32, float32: forward 84, 82 and 68 % at batch 1, 8 and 16, grad_input 76, 78 and 42 %,
// grad_weight 40, 43 and 30 % (its pages are often fresh). The kernels alone reach 80 to 120 % up to batch 8.
#pragma once

#include <omp.h>

#include "arena.h"
#include "block_sparse_linear_product.h"
#include "block_sparse_linear_small_batch_kernels.h"

namespace sparsenet::cpu::SPARSENET_ISA {
namespace {

constexpr int64_t kSmallBatch = 16, kMostChunks = 2;
constexpr int64_t kRunBytes = int64_t(1) << 17;  // values that the chunks take turns on: with the next run, in L2
constexpr int64_t kPartBytes = int64_t(1) << 17; // values of a task: small enough to balance the threads

// Rows of x padded to a power of two: what a kernel computes at once.
SPARSENET_INLINE int64_t chunk_width(int64_t rows) { return rows > 8 ? 16 : rows > 4 ? 8 : rows > 2 ? 4 : rows; }

template <typename S> Rows<S> rows_from(Rows<S> rows, int64_t first) {
  rows.data += first * rows.stride;
  if (rows.saved != nullptr) rows.saved += first * rows.saved_stride;
  return rows;
}

// Rows [0, rows) of source, feature blocks [begin, end) -> out [feature block][width][b], zeros outside the matrix.
template <Activation A, typename S, typename T>
void pack_small(const Rows<S>& source, int64_t rows, int64_t features, int64_t b, int64_t width, int64_t begin,
                int64_t end, T* out) {
  constexpr int lanes = kLanes<float>;
  for (int64_t block = begin; block < end; ++block)
    for (int64_t m = 0; m < width; ++m)
      for (int64_t f = 0; f < b; f += lanes) {
        const int64_t at = block * b + f, count = min_of(lanes, features - at);
        const bool inside = m < rows && count > 0;
        store_narrow(out + (block * width + m) * b + f,
                     inside ? source.template load_at<A>(m, at, count) : Vec<float>{});
      }
}

// The same for one chunk, as its kernel reads it.
template <class P, Activation A, typename S>
void pack_chunk(const Rows<S>& source, int64_t rows, int64_t features, int64_t b, int64_t width, bool lane_per_row,
                int64_t begin, int64_t end, typename P::Packed* out) {
  constexpr int lanes = kLanes<float>;
  if (lane_per_row) {
    pack_features<P, A>(columns_from(source, begin * b), 0, rows, features - begin * b, (end - begin) * b, lanes, lanes,
                        out + begin * b / P::kDepth * lanes);
  } else if constexpr (P::kDepth == 1) {
    pack_small<A>(source, rows, features, b, width, begin, end, out);
  } else {
    pack_small<A>(source, rows, features, b, width, begin, end, reinterpret_cast<BFloat16*>(out));
  }
}

// tile [B][lanes] -> [rows][B].
inline void transpose_columns(const float* from, int64_t rows, int64_t b, float* out) {
  constexpr int lanes = kLanes<float>;
  for (int64_t n = 0; n < b; n += lanes) {
    Vec<float> square[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) square[i] = load(from + (n + i) * lanes);
    transpose(square);
    for (int64_t m = 0; m < rows; ++m) store(out + m * b + n, square[m]);
  }
}

// A batch of up to kSmallBatch rows, cut into chunks of up to `most`.
struct Chunks {
  int64_t most, count, rows[kMostChunks], width[kMostChunks];

  Chunks(int64_t batch, int64_t most_rows) : most(most_rows), count(ceil_div(batch, most_rows)) {
    for (int64_t i = 0; i < count; ++i) {
      rows[i] = min_of(most, batch - i * most);
      width[i] = chunk_width(rows[i]);
    }
  }
};

// One finished block of outputs: tile [width][b] -> rows of y and of the pre-activation.
template <Activation A, typename S>
void store_small(const float* tile, int64_t b, int64_t rows, int64_t n, int64_t features, const Epilogue<S>& out,
                 int64_t m) {
  constexpr int lanes = kLanes<float>;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t f = 0; f < features; f += lanes) {
      const int64_t count = min_of(lanes, features - f);
      const Vec<float> z = load(tile + i * b + f);
      if (out.pre_activation != nullptr) store_narrow(out.pre_activation + (m + i) * out.pre_stride + n + f, z, count);
      store_narrow(out.y + (m + i) * out.y_stride + n + f, activate<A>(z), count);
    }
}

// Vectors of 4 lanes would leave no row of values for a chunk of 8.
constexpr bool kHasSmallBatch = kLanes<float> >= 8;
SPARSENET_INLINE bool is_small(int64_t batch, int64_t b) { return batch <= kSmallBatch && b >= 16; }
// The same for forward and grad_input: with 8 lanes, 16 rows of float32 are bound by multiply-adds, in which larger
// batches' kernels are better.
template <typename S> bool is_small_product(int64_t batch, int64_t b) {
  return is_small(batch, b) && (kLanes<float> > 8 || sizeof(S) < sizeof(float) || batch <= 8);
}

// What the sums of a block of outputs begin with, `features` of them inside the matrix: tile [width][b], or
// [b][lanes] with a lane per row.
template <typename S>
void start_tile(const S* bias, int64_t features, int64_t b, int64_t width, bool lane_per_row, float* tile) {
  constexpr int lanes = kLanes<float>;
  for (int64_t n = 0; n < b; n += lanes) {
    const int64_t count = min_of(lanes, features - n);
    const Vec<float> start = bias != nullptr && count > 0 ? load_wide(bias + n, count) : Vec<float>{};
    if (lane_per_row) {
      for (int i = 0; i < lanes; ++i) store(tile + (n + i) * lanes, broadcast(float(start[i])));
    } else {
      for (int64_t m = 0; m < width; ++m) store(tile + m * b + n, start);
    }
  }
}

template <class P, Activation A, typename S>
void forward_small_with(const Product<S>& op, int64_t b, const Rows<S>& source, int64_t batch, const Epilogue<S>& out,
                        int threads) {
  using T = typename P::Packed;
  const Chunks chunks(batch, kForwardRows<P, S>);
  const int64_t block_bytes = b * b * int64_t(sizeof(S)), run_blocks = max_of(1, kRunBytes / block_bytes);
  const int64_t parts = max_of(threads, min_of(op.num_blocks * block_bytes / kPartBytes, 64 * threads));
  ArenaPlan plan;
  SharedPiece<T> packed[kMostChunks];
  TaskPiece<float> tiles[kMostChunks];
  RunKernel<P, S> kernels[kMostChunks];
  bool lane_per_row[kMostChunks];
  for (int64_t c = 0; c < chunks.count; ++c) {
    packed[c] = plan.shared<T>(op.in_blocks * chunks.width[c] * b / P::kDepth);
    tiles[c] = plan.per_task<float>(chunks.width[c] * b);
    kernels[c] = run_kernel_for<P, S>(b, chunks.width[c]);
    lane_per_row[c] = has_lane_per_row<P, S>(chunks.width[c]);
  }
  const auto columns_piece = plan.per_task<float>(chunks.most * b);
  const Arena arena(plan, threads);
  if (arena.dry()) return;
  int64_t next_part = 0;

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    const int64_t in_begin = thread * op.in_blocks / team, in_end = (thread + 1) * op.in_blocks / team;
    for (int64_t c = 0; c < chunks.count; ++c)
      pack_chunk<P, Activation::none>(rows_from(source, c * chunks.most), chunks.rows[c], op.inputs, b, chunks.width[c],
                                      lane_per_row[c], in_begin, in_end, arena.at(packed[c]));
#pragma omp barrier
    float* const columns = arena.at(columns_piece, thread);
    for (int64_t part; (part = __atomic_fetch_add(&next_part, 1, __ATOMIC_RELAXED)) < parts;) {
      const int64_t end = part_begin(op, 1, part + 1, parts);
      for (int64_t r = part_begin(op, 1, part, parts); r < end; ++r) {
        const int64_t features = min_of(b, op.outputs - r * b);
        for (int64_t c = 0; c < chunks.count; ++c)
          start_tile(out.bias != nullptr ? out.bias + r * b : nullptr, features, b, chunks.width[c], lane_per_row[c],
                     arena.at(tiles[c], thread));
        for (int64_t first = op.crow[r]; first < op.crow[r + 1]; first += run_blocks) {
          const SmallRun run = {op.features + first, first, min_of(run_blocks, op.crow[r + 1] - first)};
          for (int64_t c = 0; c < chunks.count; ++c)
            kernels[c](run, op.values, arena.at(packed[c]), arena.at(tiles[c], thread));
        }
        for (int64_t c = 0; c < chunks.count; ++c) {
          const float* const tile = arena.at(tiles[c], thread);
          if (lane_per_row[c]) transpose_columns(tile, chunks.rows[c], b, columns);
          store_small<A>(lane_per_row[c] ? columns : tile, b, chunks.rows[c], r * b, features, out, c * chunks.most);
        }
      }
    }
  }
}

// The gradient of values, grad_values [num_blocks, b, b], and grad_bias [outputs], either of which may be null.
template <Activation A, typename S>
void grad_weight_small(const PatternView& p, const Rows<S>& grad_z, const Rows<S>& x, int64_t batch, S* grad_values,
                       S* grad_bias, int threads) {
  const int64_t b = p.block_size, blocks = grad_values != nullptr ? p.num_blocks : 0;
  const int64_t x_blocks = blocks > 0 ? p.block_cols() : 0, z_blocks = p.block_rows(), strip = batch * b;
  const int64_t part_blocks = max_of(1, kPartBytes / (b * b * int64_t(sizeof(S))));
  ArenaPlan plan;
  const auto z_piece = plan.shared<float>(z_blocks * strip), x_piece = plan.shared<float>(x_blocks * strip);
  const Arena arena(plan);
  if (arena.dry()) return;
  float* const z_packed = arena.at(z_piece);
  float* const x_packed = arena.at(x_piece);
  const OuterKernel<S> outer = outer_kernel_for<S>(b);
  int64_t next_part = 0;

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    const int64_t z_begin = thread * z_blocks / team, z_end = (thread + 1) * z_blocks / team;
    pack_small<A>(grad_z, batch, p.rows, b, batch, z_begin, z_end, z_packed);
    pack_small<Activation::none>(x, batch, p.cols, b, batch, thread * x_blocks / team, (thread + 1) * x_blocks / team,
                                 x_packed);
    if (grad_bias != nullptr)
      for (int64_t n = z_begin * b; n < min_of(z_end * b, p.rows); ++n) {
        const float* z = z_packed + n / b * strip + n % b;
        float sum = 0;
        for (int64_t m = 0; m < batch; ++m) sum += z[m * b];
        narrow(sum, grad_bias + n);
      }
#pragma omp barrier
    for (int64_t first; (first = __atomic_fetch_add(&next_part, 1, __ATOMIC_RELAXED) * part_blocks) < blocks;)
      for (int64_t i = first; i < min_of(blocks, first + part_blocks); ++i)
        outer(z_packed + p.row[i] * strip, x_packed + p.col[i] * strip, batch, grad_values + i * b * b);
  }
}

template <class P, typename S> void forward_small(const LinearForward& op, int threads) {
  const auto product = product_of(op.pattern, false, static_cast<const S*>(op.values), true);
  with_activation(op.activation, [&]<Activation A>() {
    forward_small_with<P, A>(product, op.pattern.block_size, rows_of<S>(op.x), op.x.rows, forward_epilogue<S>(op),
                             threads);
  });
}

// Each thread takes a share of the block columns, all of whose sums it keeps, and walks its blocks in row order.
template <class P, Activation A, typename S> void grad_input_small(const LinearBackward& op, int threads) {
  using T = typename P::Packed;
  const PatternView& p = op.pattern;
  const S* const values = static_cast<const S*>(op.values);
  const auto product = product_of(p, true, values, false);
  const Rows<S> source = grad_z_rows<S>(op);
  const Epilogue<S> out = grad_input_epilogue<S>(op);
  const int64_t b = p.block_size, rows = p.block_rows(), cols = p.block_cols(), parts = threads;
  const int64_t run_blocks = max_of(1, kRunBytes / (b * b * int64_t(sizeof(S))));
  const Chunks chunks(op.grad_y.rows, kGradInputRows);
  ArenaPlan plan;
  SharedPiece<T> packed[kMostChunks];
  SharedPiece<float> tiles[kMostChunks];
  BlocksKernel<P, S> kernels[kMostChunks];
  for (int64_t c = 0; c < chunks.count; ++c) {
    packed[c] = plan.shared<T>(rows * chunks.width[c] * b / P::kDepth);
    tiles[c] = plan.shared<float>(cols * chunks.width[c] * b);
    kernels[c] = blocks_kernel_for<P, S>(b, chunks.width[c]);
  }
  const auto lists = plan.shared<int32_t>(p.num_blocks);
  const Arena arena(plan);
  if (arena.dry()) return;

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    for (int64_t c = 0; c < chunks.count; ++c)
      pack_chunk<P, A>(rows_from(source, c * chunks.most), chunks.rows[c], p.rows, b, chunks.width[c], false,
                       thread * rows / team, (thread + 1) * rows / team, arena.at(packed[c]));
#pragma omp barrier
    for (int64_t part = thread; part < parts; part += team) {
      const int64_t begin = part_begin(product, 1, part, parts), end = part_begin(product, 1, part + 1, parts);
      const int64_t count = p.t_crow[end] - p.t_crow[begin];
      int32_t* const list = arena.at(lists) + p.t_crow[begin];
      for (int64_t i = 0, found = 0; found < count; ++i) {
        list[found] = int32_t(i);
        found += p.col[i] >= begin && p.col[i] < end;
      }
      for (int64_t c = 0; c < chunks.count; ++c)
        memset(arena.at(tiles[c]) + begin * chunks.width[c] * b, 0,
               size_t((end - begin) * chunks.width[c] * b) * sizeof(float));
      for (int64_t first = 0; first < count; first += run_blocks) {
        const SmallBlocks blocks = {list + first, min_of(run_blocks, count - first), count - first, p.row, p.col};
        for (int64_t c = 0; c < chunks.count; ++c) kernels[c](blocks, values, arena.at(packed[c]), arena.at(tiles[c]));
      }
      for (int64_t k = begin; k < end; ++k)
        for (int64_t c = 0; c < chunks.count; ++c)
          store_small<Activation::none>(arena.at(tiles[c]) + k * chunks.width[c] * b, b, chunks.rows[c], k * b,
                                        min_of(b, p.cols - k * b), out, c * chunks.most);
    }
  }
}

} // namespace
} // namespace sparsenet::cpu::SPARSENET_ISA
