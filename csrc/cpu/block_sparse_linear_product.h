// forward and grad_input of block_sparse_linear: one loop for both, `multiply`.
//
//   forward       y[m][n]  = act(sum_k W[n][k] x[m][k] + bias[n])       over the active blocks of block row n / b
//   grad_input    dx[m][k] = sum_n W[n][k] dz[m][n]                     over the active blocks of block column k / b
//
//   x (or dz) of a task, packed [feature][rows of a tile]        in registers, over a run of 128 features:
//   |  .  .  A  .  .  B  .  |   at most 512 KiB or one tile,     8 outputs x 3 vectors of rows (AVX2: 4 x 3)
//   |  .  .  A  .  .  B  .  |   in L2
//
//   block row: A, B, ...   ->   acc [b outputs][rows of a tile], in L1   ->   transposed, bias, activation   ->   y
//
// A task packs a few tiles of rows, then walks all block rows (for grad_input: block columns) past them. Per feature it
// loads 3 vectors of x from L1 and broadcasts 8 weights from where they lie in `values`: 24 multiply-adds for 11 loads.
// The x of a run stays in L1; the next run's weights and the lines of y are fetched meanwhile.
//
// Bytes for each output, with d the density, K its inputs, N the outputs and s the size of an element:
//   memory   K s / N of x, read once and packed;  2 s of y, fetched and written;
//            d K s / (rows of the task) of values, from L3 where they fit: once for each task
//   L1       d K s / 8 of x and d K s / 48 of values (AVX2: 4 and 24)
//
// Measured: of the multiply-add peak of a core of an AMD EPYC (Zen 4) with AVX-512, one thread, processor time of the
// kernel, 4096 x 4096, batch 512, b = 32: forward 65, 91 and 95 % at 2, 10 and 50 % density, grad_input 61, 90 and 97
// %; in bfloat16 62, 88 and 96 %, and 61, 84 and 91 %.
#pragma once

#include <omp.h>

#include "arena.h"
#include "dispatch.h"
#include "tile.h"

namespace sparsenet::cpu::SPARSENET_ISA {
namespace {

constexpr int64_t kPanelBytes = int64_t(1) << 19; // packed x of one task: a quarter of a common 2 MiB L2

template <typename W> struct Product {
  const W* values;
  const int32_t* crow;     // [out_blocks + 1]
  const int32_t* features; // [num_blocks] input block of each entry
  const int32_t* blocks;   // [num_blocks] its place in values; null: in order
  int64_t num_blocks, out_blocks, in_blocks, outputs, inputs;
};

// The pattern as it is walked: block rows for forward, block columns (transposed) for grad_input.
template <typename W>
Product<W> product_of(const PatternView& p, bool transposed, const W* values, bool values_in_walk_order) {
  if (!transposed)
    return {values, p.crow, p.col, nullptr, p.num_blocks, p.block_rows(), p.block_cols(), p.rows, p.cols};
  return {values,         p.t_crow, p.t_row, values_in_walk_order ? nullptr : p.t_block, p.num_blocks, p.block_cols(),
          p.block_rows(), p.cols,   p.rows};
}

// The block row at which part `part` of `parts` begins, a multiple of `group`, so that the parts hold about equally
// many blocks.
template <typename W> int64_t part_begin(const Product<W>& op, int64_t group, int64_t part, int64_t parts) {
  if (part >= parts) return op.out_blocks;
  const int64_t goal = part * (op.num_blocks * 8 + op.out_blocks) / parts;
  int64_t low = 0, high = op.out_blocks; // first row whose cost before it reaches the goal
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (int64_t(op.crow[middle]) * 8 + middle < goal) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return min_of(ceil_div(low, group) * group, op.out_blocks);
}

template <typename S> struct Epilogue {
  const S* bias; // [outputs] or null
  S* y;
  int64_t y_stride;
  S* pre_activation; // null: not wanted
  int64_t pre_stride;
};

template <typename S> Rows<S> grad_z_rows(const LinearBackward& op) {
  return {static_cast<const S*>(op.grad_y.data), op.grad_y.stride, static_cast<const S*>(op.saved.data),
          op.saved.stride};
}

template <typename S> Epilogue<S> forward_epilogue(const LinearForward& op) {
  return {static_cast<const S*>(op.bias), static_cast<S*>(op.y.data), op.y.stride,
          static_cast<S*>(op.pre_activation.data), op.pre_activation.stride};
}

template <typename S> Epilogue<S> grad_input_epilogue(const LinearBackward& op) {
  return {nullptr, static_cast<S*>(op.grad_x.data), op.grad_x.stride, nullptr, 0};
}

template <class P>
using Walk = void (*)(const Product<typename P::Packed>&, const typename P::Packed* x, int64_t begin, int64_t end,
                      FetchQueue& fetch, typename P::Accumulator* acc);

template <class P, int B, int MV, bool kTransposed>
void walk_block_rows(const Product<typename P::Packed>& op, const typename P::Packed* x, int64_t begin, int64_t end,
                     FetchQueue& fetch, typename P::Accumulator* acc) {
  for (int64_t r = begin; r < end; ++r) {
    const int64_t first = op.crow[r];
    const BlockRun run = {op.features + first, op.blocks != nullptr ? op.blocks + first : nullptr, first,
                          op.crow[r + 1] - first, op.num_blocks - first};
    multiply_blocks<P, B, MV, kTransposed>(x, op.values, run, fetch,
                                           acc + (r - begin) * B * MV * kLanes<typename P::Packed>);
  }
}

// What multiply() needs to know of a block size: its widest tile and the walk for each tile width.
template <class P> struct Walks {
  static constexpr int kMost = 8; // vectors of any tile
  int block_size;
  int max_vectors;
  Walk<P> by_vectors[kMost + 1]; // null: wider than this block size's tiles
};

template <class P, int B, int MV, bool kTransposed> constexpr Walk<P> walk_of() {
  if constexpr (MV <= TileConfig<B>::kMaxVectors) return walk_block_rows<P, B, MV, kTransposed>;
  return nullptr;
}

template <class P, bool kTransposed> Walks<P> walks_for(int block_size) {
  constexpr int smallest = P::kDepth == 1 ? 1 : 4; // a pair is two features of a block
  return with_block_size<smallest, 128>(block_size, []<int B>() {
    Walks<P> walks = {.block_size = B, .max_vectors = TileConfig<B>::kMaxVectors, .by_vectors = {}};
    static_assert(TileConfig<B>::kMaxVectors <= Walks<P>::kMost, "a walk for every width of a tile");
    for (int v = 1; v <= walks.max_vectors; ++v)
      walks.by_vectors[v] =
          with_one_of<1, 2, 3, 4, 5, 6, 7, 8>(v, []<int MV>() { return walk_of<P, B, MV, kTransposed>(); });
    return walks;
  });
}

// How the batch is cut: tiles of nearly equal numbers of vectors, grouped into tasks; with fewer tiles than threads the
// block rows are cut as well.
struct Tiling {
  int64_t vectors, tiles, tasks_of_tiles, row_parts;

  Tiling(int64_t rows, int lanes, int max_vectors, int64_t tile_bytes, int threads) {
    vectors = ceil_div(rows, lanes);
    tiles = ceil_div(vectors, max_vectors);
    if (vectors >= 2 * threads) tiles = ceil_div(tiles, threads) * threads;
    const int64_t per_thread = ceil_div(tiles, threads);
    const int64_t per_task = max_of(1, min_of(kPanelBytes / max_of(tile_bytes, 1), 8));
    tasks_of_tiles = tiles < threads ? tiles : threads * ceil_div(per_thread, per_task);
    row_parts = tiles < threads ? ceil_div(threads, tiles) : 1;
  }
  int64_t tasks() const { return tasks_of_tiles * row_parts; }
  int64_t tiles_per_task() const { return ceil_div(tiles, tasks_of_tiles); }
  int64_t first_tile(int64_t task) const { return task * tiles / tasks_of_tiles; }
  int64_t first_vector(int64_t tile) const { return tile * vectors / tiles; }
};

template <class P, Activation ASource, Activation AOut, typename S>
void multiply(const Product<typename P::Packed>& op, const Walks<P>& walks, const Rows<S>& source, int64_t rows,
              const Epilogue<S>& out, int threads) {
  using T = typename P::Packed;
  using C = typename P::Accumulator;
  constexpr int lanes = kLanes<T>;
  const int64_t b = walks.block_size, group = max_of(1, kStoredTogether<S> / b);
  const int64_t padded_inputs = op.in_blocks * b, packed_inputs = ceil_div(padded_inputs, P::kDepth);
  const int64_t tile_elements = packed_inputs * walks.max_vectors * lanes;
  const Tiling tiling(rows, lanes, walks.max_vectors, tile_elements * int64_t(sizeof(T)), threads);
  threads = int(min_of(threads, tiling.tasks()));
  ArenaPlan plan;
  const auto x_piece = plan.per_task<T>(tile_elements * tiling.tiles_per_task());
  const auto acc_piece = plan.per_task<C>(group * b * walks.max_vectors * lanes);
  const Arena arena(plan, threads);
  if (arena.dry()) return;
  int64_t next_task = 0;

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    T* const x = arena.at(x_piece, omp_get_thread_num());
    C* const acc = arena.at(acc_piece, omp_get_thread_num());
    FetchQueue fetch;
    for (int64_t task; (task = __atomic_fetch_add(&next_task, 1, __ATOMIC_RELAXED)) < tiling.tasks();) {
      const int64_t tile_begin = tiling.first_tile(task / tiling.row_parts);
      const int64_t tile_end = tiling.first_tile(task / tiling.row_parts + 1);
      const int64_t part = task % tiling.row_parts;
      const int64_t row_begin = part_begin(op, group, part, tiling.row_parts);
      const int64_t row_end = part_begin(op, group, part + 1, tiling.row_parts);
      T* at = x;
      for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
        const int64_t m = tiling.first_vector(tile) * lanes, width = tiling.first_vector(tile + 1) * lanes - m;
        pack_features<P, ASource>(source, m, min_of(rows, m + width), op.inputs, padded_inputs, width, width, at);
        at += packed_inputs * width;
      }
      for (int64_t r = row_begin; r < row_end; r += group) {
        const int64_t r_end = min_of(r + group, row_end), n = r * b, n_end = min_of(r_end * b, op.outputs);
        at = x;
        for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
          const int64_t m = tiling.first_vector(tile) * lanes, width = tiling.first_vector(tile + 1) * lanes - m;
          for (int64_t i = 0; i < (r_end - r) * b; ++i) {
            const C bias = out.bias != nullptr && n + i < n_end ? widen(out.bias[n + i]) : C(0);
            for (int64_t v = 0; v < width; v += lanes) store(acc + i * width + v, broadcast<C>(bias));
          }
          S* const y = out.y + m * out.y_stride + n;
          fetch.clear(); // what the last block row left over comes too late
          for (int64_t f = n; f < n_end; f += 64 / int64_t(sizeof(S)))
            fetch.push(y + f - n, out.y_stride * int64_t(sizeof(S)), min_of(width, rows - m));
          walks.by_vectors[width / lanes](op, at, r, r_end, fetch, acc);
          store_tile<AOut>(acc, width, min_of(width, rows - m), n_end - n, y, out.y_stride,
                           out.pre_activation != nullptr ? out.pre_activation + m * out.pre_stride + n : nullptr,
                           out.pre_stride);
          at += packed_inputs * width;
        }
      }
    }
  }
}

} // namespace
} // namespace sparsenet::cpu::SPARSENET_ISA
