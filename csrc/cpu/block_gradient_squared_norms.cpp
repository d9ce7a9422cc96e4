// block_gradient_squared_norms on the CPU, and the gradient of a list of candidate blocks.
//
//   norms[i][j] = || sum_m dz[m][i-th block of outputs]^T x[m][j-th block of inputs] ||_F^2
//
//     x of a task, packed for the whole batch: [strip][rows][32]        acc [32][32] += g^T x over the whole batch,
//     |  0  |  1  |  2  | ... |   at most 4 MiB, in L3                   in L1, made as grad_weight makes it; then
//   g |  strip of dz, in L2                                             squared, summed and forgotten
//
// A task packs a range of block columns of x (at most kNormStripsBytes, at least one block column), then walks the
// block rows past it. Where the batch is small against b^2 the norms come from Gram matrices instead:
// block_gradient_squared_norms_gram.h. The way is chosen by the whole matrix, with the work that each would have.
//
// Bytes for each norm at batch M, with elements of s bytes and w = min(b, 32): 4 written, M b^2 s / w of x from L3 and
// as many of dz from L2; nothing of the gradient reaches memory.
//
// Measured: 71 % of the multiply-add peak of 2 cores of an AMD EPYC (Zen 4) with AVX-512 at 4096 x 4096, b = 16, batch
// 512, float32; 71 % of that of bfloat16 at b = 32, batch 1024.
#include <omp.h>

#include "arena.h"
#include "block_gradient_squared_norms_gram.h"
#include "block_sparse_linear_grad_weight.h"
#include "dispatch.h"

namespace sparsenet::cpu::SPARSENET_ISA {
namespace {

// The whole batch of a range of x: it streams from the outer cache, 2 b flops per element of it. Narrower ranges would
// pack grad_z more often.
constexpr int64_t kNormStripsBytes = int64_t(4) << 20;

template <typename C> float squared_norm(const C* block, int64_t elements) {
  Vec<C> sum = {};
  int64_t i = 0;
  for (; i + kLanes<C> <= elements; i += kLanes<C>) sum += load(block + i) * load(block + i);
  C total = sum_lanes(sum);
  for (; i < elements; ++i) total += block[i] * block[i];
  return float(total);
}

template <class P, typename S> struct NormsTask {
  using C = typename P::Accumulator;
  const GradientNorms& op;
  Strips<P> x, g;
  C* acc;                      // [2][W][W]
  int64_t first_col, last_col; // block columns that x holds
  int64_t packed_group = -1;

  void block_row(int64_t r) {
    const int64_t b = op.block_size;
    float* out = op.norms + (r - op.block_row_begin) * ceil_div(op.x.cols, b);
    if (is_narrow<C>(b)) {
      if constexpr (P::kDepth == 1) narrow_row(r, out);
      return;
    }
    for (int64_t u = 0; u < b; u += x.width) {
      pack_strips<P, Activation::none>(columns_from(rows_of<S>(op.grad_z), r * b + u), g, 1,
                                       {op.grad_z.cols - (r * b + u), op.x.rows, 0});
      wide_row(u == 0, out);
    }
  }

private:
  void wide_row(bool first, float* out) {
    const int64_t w = x.width, per_block = op.block_size / w, squares = (last_col - first_col) * per_block;
    const int64_t step = w == kLanes<C> ? 2 : 1;
    FetchQueue nothing;
    for (int64_t s = 0; s < squares; s += step) {
      const int64_t here = min_of(step, squares - s);
      memset(acc, 0, size_t(2 * w * w) * sizeof(C));
      sum_strips_of<P>(w)(g.data, x.strip(s), x.strip(s + here - 1), x.rows / P::kDepth, nothing, acc, acc + w * w);
      for (int64_t j = 0; j < here; ++j) {
        const int64_t col = first_col + (s + j) / per_block;
        const float norm = squared_norm(acc + j * w * w, w * w);
        out[col] = first && (s + j) % per_block == 0 ? norm : out[col] + norm;
      }
    }
  }

  void narrow_row(int64_t r, float* out) {
    const int64_t b = op.block_size, rows_at_once = kLanes<C> / b, group = r / rows_at_once, n = group * kLanes<C>;
    if (group != packed_group)
      pack_strips<P, Activation::none>(columns_from(rows_of<S>(op.grad_z), n), g, rows_at_once,
                                       {op.grad_z.cols - n, op.x.rows, 0});
    packed_group = group;
    const int64_t together = blocks_together<C>(b);
    const C* strips[kLanes<C>];
    for (int64_t col = first_col; col < last_col; col += together) {
      const int64_t here = min_of(together, last_col - col);
      memset(acc, 0, size_t(together * b * b) * sizeof(C));
      for (int64_t j = 0; j < together; ++j) strips[j] = x.strip(col + min_of(j, here - 1) - first_col);
      sum_features_of<C>(b)(g.strip(r % rows_at_once), strips, x.feature_stride(), x.rows, acc);
      for (int64_t j = 0; j < here; ++j) out[col + j] = squared_norm(acc + j * b * b, b * b);
    }
  }
};

template <class P, typename S> void norms_with(const GradientNorms& op, int threads) {
  using T = typename P::Packed;
  using C = typename P::Accumulator;
  const int64_t b = op.block_size, width = strip_width(b), in_blocks = ceil_div(op.x.cols, b), per_block = b / width;
  const Strips<P> strip = {nullptr, width, ceil_div(max_of(op.x.rows, 1), 16) * 16};
  const int64_t fitting = max_of(1, kNormStripsBytes / strip.bytes(per_block));
  const int64_t ranges = max_of(ceil_div(in_blocks, fitting), min_of(threads, in_blocks));
  const int64_t widest = ceil_div(in_blocks, ranges);
  threads = int(min_of(threads, ranges));
  ArenaPlan plan;
  const auto x_piece = plan.per_task<T>(strip.elements(widest * per_block));
  const auto g_piece = plan.per_task<T>(strip.elements(max_of(1, kLanes<C> / width)));
  const auto acc_piece = plan.per_task<C>(2 * width * width + kLanes<C>);
  const Arena arena(plan, threads);
  if (arena.dry()) return;
  int64_t next_range = 0;

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int64_t thread = omp_get_thread_num();
    for (int64_t range; (range = __atomic_fetch_add(&next_range, 1, __ATOMIC_RELAXED)) < ranges;) {
      const int64_t begin = range * in_blocks / ranges, end = (range + 1) * in_blocks / ranges;
      NormsTask<P, S> task = {.op = op,
                              .x = {arena.at(x_piece, thread), width, strip.rows},
                              .g = {arena.at(g_piece, thread), width, strip.rows},
                              .acc = arena.at(acc_piece, thread),
                              .first_col = begin,
                              .last_col = end};
      pack_strips<P, Activation::none>(columns_from(rows_of<S>(op.x), begin * b), task.x, (end - begin) * per_block,
                                       {op.x.cols - begin * b, op.x.rows, 0});
      for (int64_t r = op.block_row_begin; r < op.block_row_end; ++r) task.block_row(r);
    }
  }
}

template <typename S> void norms_of(const GradientNorms& op, int threads) {
  const int64_t b = op.block_size;
  const bool as_pairs = kHasPairs<S> && b >= kLanes<float>;
  // Of the gradient's multiply-adds: where both take equally long, measured. Gram matrices are always of floats. By the
  // whole matrix, whatever rows are asked for: slices add up to the same norms bit for bit.
  const double even = as_pairs ? 0.5 : 0.9;
  const int64_t out_blocks = ceil_div(op.grad_z.cols, b), in_blocks = ceil_div(op.x.cols, b);
  if (gram_work(op.x.rows, out_blocks, in_blocks, b) <
      even * double(op.x.rows) * double(out_blocks * b) * double(op.x.cols))
    return gram_norms<S>(op, rows_of<S>(op.grad_z), rows_of<S>(op.x), threads);
  with_operands<S>(as_pairs, [&]<class P>() { norms_with<P, S>(op, threads); });
}

template <typename S> void candidates_of(const CandidateGradients& op, int threads) {
  const int64_t b = op.block_size;
  const BlockGradients<S> gradients = {.crow = op.crow,
                                       .col = op.col,
                                       .block = op.block,
                                       .count = op.num_places,
                                       .out_blocks = ceil_div(op.grad_z.cols, b),
                                       .in_blocks = ceil_div(op.x.cols, b),
                                       .outputs = op.grad_z.cols,
                                       .inputs = op.x.cols,
                                       .batch = op.x.rows,
                                       .block_size = b,
                                       .values = static_cast<S*>(op.grads),
                                       .bias = nullptr};
  grad_weight<Activation::none>(gradients, rows_of<S>(op.grad_z), rows_of<S>(op.x), threads);
}

} // namespace

constinit const Row<GradientNorms> kGradientNorms =
    by_dtype<GradientNorms>([]<typename S>() -> Kernel<GradientNorms> { return norms_of<S>; });
constinit const Row<CandidateGradients> kCandidateGradients =
    by_dtype<CandidateGradients>([]<typename S>() -> Kernel<CandidateGradients> { return candidates_of<S>; });

} // namespace sparsenet::cpu::SPARSENET_ISA
