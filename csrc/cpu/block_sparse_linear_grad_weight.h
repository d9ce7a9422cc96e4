// grad_weight of block_sparse_linear, and the gradient of a list of candidate blocks: blocks of the dense gradient
//
//   dW[n][k] = sum_m dz[m][n] x[m][k]      at a list of places (the active blocks, or the candidates)
//
//               x of the task                         for a square of a block, in L1: acc [32][32] += g_chunk^T x_chunk
//            strips: 0   1   2   3   4 ...
//   panel   |  [rows][32] each, in L3       |            in registers, over a chunk of rows: c[8 outputs][2 vectors]
//   of rows |  .   A   .   .   B   .   .   |            (AVX2: 4 x 2)
//            ------------------------------
//   g strips (block row of A, B and the next ones): packed, in L2
//
// A task owns a run of places in row order, equal shares of them whatever the pattern, and walks the batch in panels of
// rows: it packs the x strips that its places need, then, a few block rows at a time, strips of dz, and multiplies each
// with the x strips of the blocks there. Per row of the batch it loads 2 vectors of x from L1 and broadcasts 8 elements
// of dz: 16 multiply-adds for 10 loads. Lines that the next panel and the next block rows will pack are fetched
// meanwhile.
//
// Bytes for each output dW[n][k] at batch M, with elements of s bytes and w = min(b, 32):
//   memory   s, written once (2 s more for every further panel), and what is packed: x once for each task that needs
//            it, dz once, and again by tasks that share its block row
//   caches   M s / w of x from L3 and M s / w of dz from L2;  M s / 8 of x and M s / 32 of dz from L1 (AVX2: 4, 16)
//
// Tasks share nothing, so there is no barrier; every block is summed by one task in the order of the rows: results are
// bit-identical from run to run.
//
// Measured: of the multiply-add peak of a core of an AMD EPYC (Zen 4) with AVX-512, one thread, processor time of the
// kernel, 4096 x 4096, batch 512, b = 32: 61, 90 and 95 % at 2, 10 and 50 % density, in bfloat16 59, 86 and 93 %.
// Candidates, 2 threads: 68 % at 10 % of the places, 27 % at 1 %, where packing is most of the work.
#pragma once

#include <omp.h>

#include "arena.h"
#include "strips.h"

namespace sparsenet::cpu::SPARSENET_ISA {
namespace {

constexpr int64_t kPanelRows = 512;
constexpr int64_t kStripsBytes = int64_t(4) << 20;     // packed x of a task's panel: a share of L3
constexpr int64_t kGradStripsBytes = int64_t(1) << 17; // packed dz: well within L2

// Rows of a panel: at most kPanelRows, with x packed within kStripsBytes; nearly equal panels, a multiple of 16 each.
SPARSENET_INLINE int64_t panel_rows_for(int64_t batch, int64_t bytes_per_row) {
  const int64_t whole = ceil_div(max_of(batch, 1), 16) * 16;
  const int64_t most = max_of(64, min_of(kPanelRows, kStripsBytes / max_of(bytes_per_row, 1) / 16 * 16));
  const int64_t panels = ceil_div(whole, most);
  return ceil_div(ceil_div(whole, panels), 16) * 16;
}

// The places, by block row, and where their gradients go.
template <typename S> struct BlockGradients {
  const int32_t* crow;  // [out_blocks + 1]
  const int32_t* col;   // [count], ascending within a block row
  const int32_t* block; // [count] number of each place in values; null: in order
  int64_t count;
  int64_t out_blocks, in_blocks, outputs, inputs, batch;
  int64_t block_size;
  S* values; // [count, b, b]
  S* bias;   // [outputs] or null: the column sums of dz
  int64_t place(int64_t i) const { return block != nullptr ? block[i] : i; }
};

// First i of [begin, end) whose sorted[i] is not below `limit`; end if there is none.
SPARSENET_INLINE int64_t first_at_least(const int32_t* sorted, int64_t begin, int64_t end, int64_t limit) {
  while (begin < end) {
    const int64_t middle = (begin + end) / 2;
    if (sorted[middle] < limit) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// One thread's share: places [begin, end) in block columns [first_col, last_col), panel after panel.
template <class P, Activation A, typename S> struct GradientTask {
  using T = typename P::Packed;
  using C = typename P::Accumulator;
  static constexpr bool kInPlace = sizeof(S) == sizeof(C); // values hold the sums between panels

  const BlockGradients<S>& op;
  const Rows<S>& grad_z;
  const Rows<S>& x;
  Strips<P> xs; // of the block columns
  Strips<P> gs; // of g_rows block rows
  C* acc;       // [2][W][W]; for single elements [kLanes]
  C* sums;      // [count, b, b], shared: between panels, where values cannot hold them
  C* bias;      // [outputs], shared; null: not wanted from this task
  char* needed; // [strips of x]
  int64_t g_rows, begin, end, first_col, last_col;
  bool last;                                // of all tasks: it also has the block rows without a place behind `end`
  int64_t first_row = -1;                   // of the panel
  LinesAhead x_ahead = {}, g_ahead[2] = {}; // what will be packed next: fetched while summing
  int64_t x_rate = 0, g_rate = 0;           // lines of each for every square

  void run() {
    const int64_t per_block = op.block_size / xs.width, strips = (last_col - first_col) * per_block;
    memset(needed, 0, size_t(strips));
    for (int64_t i = begin; i < end; ++i)
      if (op.col[i] >= first_col && op.col[i] < last_col)
        memset(needed + (op.col[i] - first_col) * per_block, 1, size_t(per_block));
    for (first_row = 0; first_row < max_of(op.batch, 1); first_row += xs.rows) {
      const int64_t column = first_col * op.block_size;
      if (begin < end)
        pack_strips<P, Activation::none>(columns_from(x, column), xs, strips, {op.inputs - column, op.batch, first_row},
                                         needed);
      x_ahead = {};
      if (!last_panel())
        x_ahead = LinesAhead::of(x.data + (first_row + xs.rows) * x.stride + column, x.stride,
                                 min_of(xs.rows, op.batch - first_row - xs.rows),
                                 min_of(op.inputs, last_col * op.block_size) - column);
      const int64_t squares = (end - begin) * per_block * per_block * (last_col - first_col) / max_of(op.in_blocks, 1);
      x_rate = ceil_div(x_ahead.count(), max_of(squares, 1));
      // Block rows that begin here, and before them the one that `begin` cuts: its bias is another task's.
      int64_t r = first_at_least(op.crow, 0, op.out_blocks, begin);
      if (op.crow[r] > begin) block_rows(r - 1, r, false);
      int64_t r_end = last ? op.out_blocks : first_at_least(op.crow, r, op.out_blocks, end);
      for (; r < r_end; r += g_rows) block_rows(r, min_of(r + g_rows, r_end), bias != nullptr);
    }
  }

private:
  bool first_panel() const { return first_row == 0; }
  bool last_panel() const { return first_row + xs.rows >= op.batch; }

  // Entries of block row r in this task.
  int64_t entries_begin(int64_t r) const {
    const int64_t from = max_of(op.crow[r], begin), to = min_of(op.crow[r + 1], end);
    return first_col == 0 ? from : first_at_least(op.col, from, to, first_col);
  }
  int64_t entries_end(int64_t r) const {
    const int64_t from = max_of(op.crow[r], begin), to = min_of(op.crow[r + 1], end);
    return last_col == op.in_blocks ? to : first_at_least(op.col, from, to, last_col);
  }

  void block_rows(int64_t r_begin, int64_t r_end, bool with_bias) {
    const int64_t b = op.block_size, per_block = b / xs.width, n = r_begin * b;
    bool any = with_bias;
    for (int64_t r = r_begin; r < r_end; ++r) any |= entries_begin(r) < entries_end(r);
    if (!any) return;
    pack_strips<P, A>(columns_from(grad_z, n), gs, (r_end - r_begin) * per_block, {op.outputs - n, op.batch, first_row},
                      nullptr, with_bias ? bias + n : nullptr);
    const int64_t next = r_end * b, next_features = min_of(g_rows * b, op.outputs - next);
    const int64_t panel_end = min_of(op.batch, first_row + xs.rows);
    g_ahead[0] = LinesAhead::of(grad_z.data + first_row * grad_z.stride + next, grad_z.stride, panel_end - first_row,
                                next_features);
    if constexpr (A != Activation::none)
      g_ahead[1] = LinesAhead::of(grad_z.saved + first_row * grad_z.saved_stride + next, grad_z.saved_stride,
                                  panel_end - first_row, next_features);
    int64_t squares = 0;
    for (int64_t r = r_begin; r < r_end; ++r) squares += (entries_end(r) - entries_begin(r)) * per_block * per_block;
    g_rate = ceil_div(g_ahead[0].count(), max_of(squares, 1));
    for (int64_t r = r_begin; r < r_end; ++r) {
      const int64_t from = entries_begin(r), to = entries_end(r);
      for (int64_t u = 0; u < per_block && from < to; ++u) {
        const T* g = gs.strip((r - r_begin) * per_block + u);
        if (!is_narrow<C>(b)) {
          wide_row(from, to, g, u * xs.width);
        } else if constexpr (P::kDepth == 1) {
          narrow_row(from, to, g);
        }
      }
    }
  }

  // Rows [u, u + W) of the blocks at places [from, to): squares of W x W, side by side.
  void wide_row(int64_t from, int64_t to, const T* g, int64_t u) {
    const int64_t w = xs.width, per_block = op.block_size / w, squares = (to - from) * per_block;
    const int64_t step = w == kLanes<C> ? 2 : 1;
    const SumStrips<P> sum = sum_strips_of<P>(w);
    const auto strip_of = [&](int64_t s) {
      return xs.strip((op.col[from + s / per_block] - first_col) * per_block + s % per_block);
    };
    for (int64_t s = 0; s < squares; s += step) {
      const int64_t here = min_of(step, squares - s);
      for (int64_t j = 0; j < here; ++j)
        load_square(from + (s + j) / per_block, u, (s + j) % per_block * w, acc + j * w * w);
      FetchQueue fetch;
      if (s + here < squares) fetch_square(from + (s + here) / per_block, u, (s + here) % per_block * w, fetch);
      fetch.push(g_ahead[0].next(step * g_rate));
      if constexpr (A != Activation::none) fetch.push(g_ahead[1].next(step * g_rate));
      fetch.push(x_ahead.next(step * x_rate));
      if (s + here < squares) // the next square's x, which the last one left in L3
        fetch.to_l2 = {reinterpret_cast<const char*>(strip_of(s + here)), kLineBytes, xs.bytes(1) / kLineBytes};
      sum(g, strip_of(s), strip_of(s + here - 1), xs.rows / P::kDepth, fetch, acc, acc + w * w);
      for (int64_t j = 0; j < here; ++j)
        store_square(from + (s + j) / per_block, u, (s + j) % per_block * w, acc + j * w * w);
    }
  }

  void narrow_row(int64_t from, int64_t to, const T* g) {
    if (blocks_together<T>(op.block_size) > 1) return single_row(from, to, g);
    const SumFeatures<T> sum = sum_features_of<T>(op.block_size);
    for (int64_t i = from; i < to; ++i) {
      load_square(i, 0, 0, acc);
      const T* const strip = xs.strip(op.col[i] - first_col);
      sum(g, &strip, xs.feature_stride(), xs.rows, acc);
      store_square(i, 0, 0, acc);
    }
  }

  // Blocks of one element, as many at once as a vector has lanes.
  void single_row(int64_t from, int64_t to, const T* g) {
    constexpr int64_t together = kLanes<T>;
    const T* strips[together];
    for (int64_t i = from; i < to; i += together) {
      const int64_t here = min_of(together, to - i);
      for (int64_t j = 0; j < together; ++j) strips[j] = xs.strip(op.col[i + min_of(j, here - 1)] - first_col);
      for (int64_t j = 0; j < together; ++j) acc[j] = C(0);
      sum_features<T, 1>(g, strips, xs.feature_stride(), xs.rows, acc);
      for (int64_t j = 0; j < here; ++j) {
        C* const kept = kInPlace ? reinterpret_cast<C*>(op.values) + op.place(i + j) : sums + i + j;
        const C total = first_panel() ? acc[j] : *kept + acc[j];
        if (kInPlace || last_panel()) {
          narrow(total, op.values + op.place(i + j));
        } else {
          *kept = total;
        }
      }
    }
  }

  // The lines in which the square at (u, v) of the block at place i will be kept; of whole blocks, all of a step.
  void fetch_square(int64_t i, int64_t u, int64_t v, FetchQueue& fetch) const {
    const int64_t b = op.block_size, offset = u * b + v;
    if (kInPlace || last_panel()) {
      fetch_square_of(op.values + op.place(i) * b * b + offset, fetch);
    } else {
      fetch_square_of(sums + i * b * b + offset, fetch);
    }
  }
  template <typename To> void fetch_square_of(const To* at, FetchQueue& fetch) const {
    const int64_t b = op.block_size, w = xs.width, line = kLineBytes / int64_t(sizeof(To));
    if (w == b) return fetch.push(at, kLineBytes, (w == kLanes<C> ? 2 : 1) * w * w / line);
    for (int64_t c = 0; c < w; c += line) fetch.push(at + c, b * int64_t(sizeof(To)), w);
  }

  // The square at (u, v) of the block at place i, from and to where its sum is kept.
  void load_square(int64_t i, int64_t u, int64_t v, C* to) const {
    const int64_t b = op.block_size, w = xs.width;
    if (first_panel()) {
      memset(to, 0, size_t(w * w) * sizeof(C));
      return;
    }
    const C* from = (kInPlace ? reinterpret_cast<const C*>(op.values) + op.place(i) * b * b : sums + i * b * b) + u * b;
    if (w == b) {
      memcpy(to, from, size_t(w * w) * sizeof(C));
    } else {
      for (int64_t r = 0; r < w; ++r) memcpy(to + r * w, from + r * b + v, size_t(w) * sizeof(C));
    }
  }
  void store_square(int64_t i, int64_t u, int64_t v, const C* from) const {
    const int64_t b = op.block_size;
    if (kInPlace || last_panel()) {
      copy_square(from, op.values + op.place(i) * b * b + u * b + v);
    } else {
      copy_square(from, sums + i * b * b + u * b + v);
    }
  }
  template <typename To> void copy_square(const C* from, To* to) const {
    const int64_t b = op.block_size, w = xs.width, length = w == b ? w * w : w; // of what lies in one piece
    for (int64_t r = 0; r * length < w * w; ++r)
      for (int64_t c = 0; c < length; c += kLanes<C>)
        store_narrow(to + r * b + c, load(from + r * length + c), length - c);
  }
};

template <class P, Activation A, typename S>
void grad_weight_with(const BlockGradients<S>& op, const Rows<S>& grad_z, const Rows<S>& x, int threads) {
  using T = typename P::Packed;
  using C = typename P::Accumulator;
  const int64_t b = op.block_size, width = strip_width(b), per_block = b / width;
  // Threads share out places, and with more than three of them block columns too: each packs less of x then.
  int64_t ranges = 1;
  while ((ranges + 1) * (ranges + 1) <= threads && ranges < op.in_blocks) ++ranges;
  const int64_t parts = max_of(1, min_of(threads / ranges, op.count)), tasks = ranges * parts;
  const int64_t widest = ceil_div(op.in_blocks, ranges);
  const int64_t rows = panel_rows_for(op.batch, widest * b * int64_t(sizeof(T)) / P::kDepth);
  const bool keeps_sums = rows < op.batch && sizeof(S) != sizeof(C);
  const Strips<P> strip = {nullptr, width, rows};
  const int64_t g_rows = max_of(max_of(1, kLanes<C> / b), kGradStripsBytes / strip.bytes(per_block));

  ArenaPlan plan;
  const auto x_piece = plan.per_task<T>(op.count > 0 ? strip.elements(widest * per_block) : 0);
  const auto g_piece = plan.per_task<T>(strip.elements(g_rows * per_block));
  const auto acc_piece = plan.per_task<C>(2 * width * width + kLanes<C>);
  const auto needed_piece = plan.per_task<char>(widest * per_block);
  const auto bias_piece = plan.shared<C>(op.bias != nullptr ? op.outputs : 0);
  const auto sums_piece = plan.shared<C>(keeps_sums ? op.count * b * b : 0);
  const Arena arena(plan, tasks);
  if (arena.dry()) return;
  C* const bias = op.bias != nullptr ? arena.at(bias_piece) : nullptr;
  if (bias != nullptr) memset(bias, 0, size_t(op.outputs) * sizeof(C));

#pragma omp parallel for num_threads(int(tasks)) schedule(static, 1) if (tasks > 1)
  for (int64_t t = 0; t < tasks; ++t) {
    const int64_t range = t % ranges, part = t / ranges;
    GradientTask<P, A, S> task = {.op = op,
                                  .grad_z = grad_z,
                                  .x = x,
                                  .xs = {arena.at(x_piece, t), width, rows},
                                  .gs = {arena.at(g_piece, t), width, rows},
                                  .acc = arena.at(acc_piece, t),
                                  .sums = arena.at(sums_piece),
                                  .bias = range == 0 ? bias : nullptr,
                                  .needed = arena.at(needed_piece, t),
                                  .g_rows = g_rows,
                                  .begin = part * op.count / parts,
                                  .end = (part + 1) * op.count / parts,
                                  .first_col = range * op.in_blocks / ranges,
                                  .last_col = (range + 1) * op.in_blocks / ranges,
                                  .last = part + 1 == parts};
    task.run();
  }
  for (int64_t n = 0; op.bias != nullptr && n < op.outputs; ++n) narrow(bias[n], op.bias + n);
}

template <Activation A, typename S>
void grad_weight(const BlockGradients<S>& op, const Rows<S>& grad_z, const Rows<S>& x, int threads) {
  with_operands<S>(op.block_size >= kLanes<float>, [&]<class P>() { grad_weight_with<P, A>(op, grad_z, x, threads); });
}

} // namespace
} // namespace sparsenet::cpu::SPARSENET_ISA
