// Blocks of the dense weight gradient, dW[n][k] = sum_m dz[m][n] x[m][k], at a list of block places. Shared by the
// backward of block_sparse_linear (the active blocks), by candidate gradients and by block_gradient_squared_norms.
//
// Each task owns a range of block columns (and, with few columns, a part of the block rows). It walks the batch in
// panels of rows: the panel's x is packed strip by strip into a buffer that stays in L2; then, block row by block row,
// one strip of dz is packed and multiplied with the x strips of the blocks there. Only dz and the results stream past.
// Tasks share nothing, so there is no barrier, and every sum runs in one fixed order.
#pragma once

#include <omp.h>

#include "tile.h"
#include "workspace.h"

namespace sparsenet::cpu::SPARSENET_ISA {
namespace {

constexpr int64_t kStripsBytes = int64_t(1) << 19; // packed x of one task and panel: a quarter of a common 2 MiB L2

// Blocks narrower than a vector are summed as dot products along the rows of feature-packed strips.
template <typename T> constexpr bool is_narrow(int64_t block) { return block < kLanes<T>; }

// Packed strips of one panel, one for each block column.
template <class P> struct Strips {
  typename P::Packed* data;
  int64_t block, panel_rows;
  int64_t stride() const { return block * (panel_rows / P::kDepth); }
  typename P::Packed* strip(int64_t s) const { return data + s * stride(); }
};

// Bytes that `count` strips take.
template <class P> int64_t strips_bytes(int64_t count, int64_t block, int64_t panel_rows) {
  return count * Strips<P>{nullptr, block, panel_rows}.stride() * int64_t(sizeof(typename P::Packed));
}

// Packs `features` columns of rows [begin, begin + panel_rows), zeros from row `batch` on; strips that `needed` marks 0
// are left alone (null: all are needed). Adds the column sums to bias_sum [features] where it is not null.
template <class P, Activation A, typename S>
void pack_strips(const Rows<S>& source, const Strips<P>& strips, int64_t features, int64_t batch, int64_t begin,
                 const char* needed, Compute<S>* bias_sum) {
  using C = Compute<S>;
  const int64_t rows = strips.panel_rows;
  if (!is_narrow<C>(strips.block)) {
    pack_rows<P, A>(source, begin, min_of(batch, begin + rows), begin + rows, features, strips.block, needed,
                    strips.data, strips.stride(), bias_sum);
  } else if constexpr (P::kDepth == 1) {
    const int64_t padded = ceil_div(features, strips.block) * strips.block;
    pack_features<P, A>(source, begin, min_of(batch, begin + rows), features, padded, rows, rows, strips.data);
    if (bias_sum == nullptr) return;
    for (int64_t f = 0; f < features; ++f) {
      Vec<C> sum = {};
      for (int64_t m = 0; m < rows; m += kLanes<C>) sum += load(strips.data + f * rows + m);
      bias_sum[f] += sum_lanes(sum);
    }
  }
}

constexpr int64_t kLineBytes = 64;

template <class P, int B>
SPARSENET_INLINE void sum_wide_block(const typename P::Packed* g, const typename P::Packed* x, int64_t panel_rows,
                                     FetchQueue& fetch, typename P::Accumulator* acc) {
  constexpr int lanes = kLanes<typename P::Packed>, outputs = kRegisters == 32 ? 8 : 4;
  constexpr int64_t chunk = 4096 / B; // rows whose strips stay in L1 over all output groups
  static_assert(B % outputs == 0 && B % (2 * lanes) == 0, "a block is whole groups of outputs and pairs of vectors");
  const int64_t rows = panel_rows / P::kDepth;
  for (int64_t m = 0; m < rows; m += chunk)
    for (int output = 0; output < B; output += outputs)
      for (int k = 0; k < B; k += 2 * lanes)
        outer_products<P, outputs>(g + m * B + output, B, x + m * B + k, x + m * B + k + lanes, B,
                                   min_of(chunk, rows - m), fetch, acc + output * B + k, acc + output * B + k + lanes,
                                   B);
}

// acc0 and acc1 [B][B] += the panel's part of two blocks of the same block row (acc1 may be null: one block only).
template <class P, int B>
void sum_blocks(const typename P::Packed* g, const typename P::Packed* x0, const typename P::Packed* x1,
                int64_t panel_rows, FetchQueue& fetch, typename P::Accumulator* acc0, typename P::Accumulator* acc1) {
  using T = typename P::Packed;
  constexpr int lanes = kLanes<T>;
  if constexpr (B < lanes) {
    constexpr int side = B < 4 ? B : 4;
    for (int block = 0; block < (acc1 != nullptr ? 2 : 1); ++block)
      for (int i = 0; i < B; i += side)
        for (int j = 0; j < B; j += side)
          dot_products<T, side>(g + i * panel_rows, (block ? x1 : x0) + j * panel_rows, panel_rows, panel_rows,
                                (block ? acc1 : acc0) + i * B + j, B);
  } else if constexpr (B == lanes) { // one vector wide: two blocks side by side
    constexpr int outputs = kRegisters == 32 ? 8 : 4;
    typename P::Accumulator unused[B * lanes] = {};
    for (int output = 0; output < B; output += outputs)
      outer_products<P, outputs>(g + output, B, x0, acc1 != nullptr ? x1 : x0, B, panel_rows / P::kDepth, fetch,
                                 acc0 + output * B, (acc1 != nullptr ? acc1 : unused) + output * B, B);
  } else {
    sum_wide_block<P, B>(g, x0, panel_rows, fetch, acc0);
    if (acc1 != nullptr) sum_wide_block<P, B>(g, x1, panel_rows, fetch, acc1);
  }
}

template <class P>
using SumBlocks = void (*)(const typename P::Packed*, const typename P::Packed*, const typename P::Packed*, int64_t,
                           FetchQueue&, typename P::Accumulator*, typename P::Accumulator*);

template <class P> SumBlocks<P> sum_blocks_for(int64_t block) {
  if constexpr (P::kDepth == 1) {
    if (block == 1) return sum_blocks<P, 1>;
    if (block == 4) return sum_blocks<P, 4>;
    if (block == 8) return sum_blocks<P, 8>;
  }
  if (block == 16) return sum_blocks<P, 16>;
  if (block == 32) return sum_blocks<P, 32>;
  if (block == 64) return sum_blocks<P, 64>;
  return sum_blocks<P, 128>;
}

// The places, by block row, and where their gradients go.
template <typename S> struct BlockGradients {
  const int32_t* crow;  // [out_blocks + 1]
  const int32_t* col;   // [count], ascending within a block row
  const int32_t* block; // [count] number of each place in values; null: in order
  int64_t count;
  int64_t out_blocks, in_blocks, outputs, inputs, batch;
  S* values; // [count, b, b]
  S* bias;   // [outputs] or null: the column sums of dz
  int64_t place(int64_t i) const { return block != nullptr ? block[i] : i; }
};

// First entry of [begin, end) whose column is not below `limit`.
SPARSENET_INLINE int64_t first_at_least(const int32_t* col, int64_t begin, int64_t end, int64_t limit) {
  while (begin < end) {
    const int64_t middle = (begin + end) / 2;
    if (col[middle] < limit) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// One task's buffers.
template <class P> struct GradientScratch {
  Strips<P> x, g;
  typename P::Accumulator* acc;  // [2, b, b]: the two blocks in work, where they are not summed in place
  typename P::Accumulator* sums; // [count, b, b] between panels, shared; null where values serve
  typename P::Accumulator* bias; // [outputs], shared: each task its own rows
  char* needed;                  // [strips of x]
};

// The lines of columns [col, col + width) in `count` rows from `row` on.
template <typename S>
void push_strip(FetchQueue& fetch, const Rows<S>& rows, int64_t row, int64_t col, int64_t width, int64_t count) {
  for (int64_t c = 0; c < width; c += kLineBytes / int64_t(sizeof(S)))
    fetch.push(rows.data + row * rows.stride + col + c, rows.stride * int64_t(sizeof(S)), count);
}

// Sums the blocks of block columns [col_begin, col_end) in block rows [row_begin, row_end) over the whole batch.
template <class P, Activation A, typename S>
void sum_range(const BlockGradients<S>& op, const Rows<S>& grad_z, const Rows<S>& x, const GradientScratch<P>& scratch,
               int64_t b, int64_t col_begin, int64_t col_end, int64_t row_begin, int64_t row_end) {
  using C = typename P::Accumulator;
  constexpr bool in_place = sizeof(S) == sizeof(C);
  const int64_t bb = b * b, group = max_of(1, kLanes<C> / b), panel_rows = scratch.x.panel_rows;
  const int64_t panels = ceil_div(max_of(op.batch, 1), panel_rows);
  const SumBlocks<P> sum = sum_blocks_for<P>(b);
  const bool with_bias = op.bias != nullptr && col_begin == 0;
  FetchQueue fetch;
  memset(scratch.needed, 0, size_t(col_end - col_begin));
  if (op.count > 0)
    for (int64_t i = op.crow[row_begin]; i < op.crow[row_end]; ++i)
      if (op.col[i] >= col_begin && op.col[i] < col_end) scratch.needed[op.col[i] - col_begin] = 1;
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t m = panel * panel_rows;
    if (op.count > 0)
      pack_strips<P, Activation::none>(columns_from(x, col_begin * b), scratch.x,
                                       min_of(col_end * b, op.inputs) - col_begin * b, op.batch, m, scratch.needed,
                                       static_cast<C*>(nullptr));
    for (int64_t first = row_begin; first < row_end; first += group) {
      const int64_t last = min_of(first + group, row_end), n = first * b, features = min_of(last * b, op.outputs) - n;
      bool packed = false;
      const auto pack_g = [&] {
        pack_strips<P, A>(columns_from(grad_z, n), scratch.g, features, op.batch, m, nullptr,
                          with_bias ? scratch.bias + n : nullptr);
        packed = true;
      };
      if (with_bias) pack_g();
      if (op.count == 0) continue;
      for (int64_t r = first; r < last; ++r) {
        const int64_t begin = first_at_least(op.col, op.crow[r], op.crow[r + 1], col_begin);
        const int64_t end = first_at_least(op.col, begin, op.crow[r + 1], col_end);
        if (begin < end && !packed) pack_g();
        fetch.clear();
        push_strip(fetch, grad_z, m, n + group * b, b, panel_rows);
        for (int64_t i = begin; i < end; i += 2) {
          const int64_t step = min_of(2, end - i);
          C* to[2] = {nullptr, nullptr};
          for (int64_t j = 0; j < step; ++j) {
            if constexpr (in_place) {
              to[j] = reinterpret_cast<C*>(op.values) + op.place(i + j) * bb;
            } else {
              to[j] = panels == 1 ? scratch.acc + j * bb : scratch.sums + (i + j) * bb;
            }
            if (panel == 0) memset(to[j], 0, size_t(bb) * sizeof(C));
          }
          if constexpr (in_place)
            if (i + 2 < end)
              fetch.push_first(op.values + op.place(i + 2) * bb, kLineBytes, 2 * bb * int64_t(sizeof(S)) / kLineBytes);
          sum(scratch.g.strip(r - first), scratch.x.strip(op.col[i] - col_begin),
              step == 2 ? scratch.x.strip(op.col[i + 1] - col_begin) : nullptr, panel_rows, fetch, to[0], to[1]);
          if constexpr (!in_place)
            if (panel + 1 == panels)
              for (int64_t j = 0; j < step; ++j)
                for (int64_t e = 0; e < bb; e += kLanes<C>)
                  store_narrow(op.values + op.place(i + j) * bb + e, load_wide(to[j] + e, bb - e), bb - e);
        }
      }
    }
  }
}

// Rows of a panel: as many as keep `strip_bytes_per_row` * rows within kStripsBytes, a multiple of 16, at least 64.
SPARSENET_INLINE int64_t panel_rows_for(int64_t batch, int64_t bytes_per_row) {
  const int64_t whole = ceil_div(max_of(batch, 1), 16) * 16;
  const int64_t most = max_of(64, kStripsBytes / max_of(bytes_per_row, 1) / 16 * 16);
  const int64_t panels = ceil_div(whole, most);
  return ceil_div(ceil_div(whole, panels), 16) * 16;
}

template <class P, Activation A, typename S>
void grad_values_with(const BlockGradients<S>& op, const Rows<S>& grad_z, const Rows<S>& x, int64_t b, int threads) {
  using T = typename P::Packed;
  using C = typename P::Accumulator;
  constexpr bool in_place = sizeof(S) == sizeof(C);
  const int64_t ranges = max_of(1, min_of(threads, op.in_blocks));
  const int64_t parts = max_of(1, min_of(ceil_div(threads, ranges), op.out_blocks)), tasks = ranges * parts;
  const int64_t widest = ceil_div(op.in_blocks, ranges), element = int64_t(sizeof(T)) / P::kDepth;
  const int64_t rows = panel_rows_for(op.batch, widest * b * element);
  const bool many_panels = op.batch > rows;
  threads = int(min_of(threads, tasks));

  WorkspacePlan plan;
  plan.piece(op.count > 0 ? strips_bytes<P>(widest, b, rows) : 0);
  const int64_t g_at = plan.piece(strips_bytes<P>(max_of(1, kLanes<C> / b), b, rows));
  const int64_t acc_at = plan.piece(2 * b * b * int64_t(sizeof(C)));
  const int64_t needed_at = plan.piece(widest);
  const int64_t per_thread = plan.bytes;
  plan.bytes *= threads;
  const int64_t bias_at = plan.piece(op.bias != nullptr ? op.outputs * int64_t(sizeof(C)) : 0);
  const int64_t sums_at = plan.piece(in_place || !many_panels ? 0 : op.count * b * b * int64_t(sizeof(C)));
  Workspace workspace(plan.bytes);
  if (workspace.dry()) return;
  C* const bias = reinterpret_cast<C*>(workspace.data() + bias_at);
  if (op.bias != nullptr) memset(bias, 0, size_t(op.outputs) * sizeof(C));
  int64_t next_task = 0;

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    char* const mine = workspace.data() + per_thread * omp_get_thread_num();
    const GradientScratch<P> scratch = {.x = {reinterpret_cast<T*>(mine), b, rows},
                                        .g = {reinterpret_cast<T*>(mine + g_at), b, rows},
                                        .acc = reinterpret_cast<C*>(mine + acc_at),
                                        .sums = reinterpret_cast<C*>(workspace.data() + sums_at),
                                        .bias = bias,
                                        .needed = mine + needed_at};
    for (int64_t task; (task = __atomic_fetch_add(&next_task, 1, __ATOMIC_RELAXED)) < tasks;) {
      const int64_t range = task % ranges, part = task / ranges;
      sum_range<P, A>(op, grad_z, x, scratch, b, range * op.in_blocks / ranges, (range + 1) * op.in_blocks / ranges,
                      part * op.out_blocks / parts, (part + 1) * op.out_blocks / parts);
    }
  }
  if (op.bias != nullptr)
    for (int64_t n = 0; n < op.outputs; ++n) narrow(bias[n], op.bias + n);
}

template <typename S, Activation A>
void grad_values(const BlockGradients<S>& op, const Rows<S>& grad_z, const Rows<S>& x, int64_t block, int threads) {
#if defined(__AVX512BF16__)
  if constexpr (sizeof(S) == 2)
    if (block >= kLanes<float>) return grad_values_with<Pair, A>(op, grad_z, x, block, threads);
#endif
  grad_values_with<Single<Compute<S>>, A>(op, grad_z, x, block, threads);
}

} // namespace
} // namespace sparsenet::cpu::SPARSENET_ISA
