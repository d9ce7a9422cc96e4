// block_gradient_squared_norms on the CPU, and the gradient of a list of candidate blocks.
//
//   norms[i][j] = || sum_m dz[m][i-th block of outputs]^T x[m][j-th block of inputs] ||_F^2
//
// The dense gradient's squares of at most 32 x 32 are made one or two at a time in L1, squared, summed and forgotten. A
// task packs a range of block columns of x for the whole batch (at most kNormStripsBytes, at least one block column),
// then walks the block rows past it.
//
// Where the batch is small against b^2 the norms come from Gram matrices instead: block_gradient_squared_norms_gram.h.
#include "block_sparse_linear_grad_weight.h"
#include "block_gradient_squared_norms_gram.h"
#include "isa.h"

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

template <typename S> Rows<S> rows_of(const Matrix& m) { return {static_cast<const S*>(m.data), m.stride, nullptr, 0}; }

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
                                       op.grad_z.cols - (r * b + u), op.x.rows, 0, nullptr, static_cast<C*>(nullptr));
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
      pack_strips<P, Activation::none>(columns_from(rows_of<S>(op.grad_z), n), g, rows_at_once, op.grad_z.cols - n,
                                       op.x.rows, 0, nullptr, static_cast<C*>(nullptr));
    packed_group = group;
    for (int64_t col = first_col; col < last_col; ++col) {
      memset(acc, 0, size_t(b * b) * sizeof(C));
      sum_features_of<C>(b)(g.strip(r % rows_at_once), x.strip(col - first_col), x.feature_stride(), x.rows, acc);
      out[col] = squared_norm(acc, b * b);
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
  WorkspacePlan plan;
  plan.piece(strip.bytes(widest * per_block));
  const int64_t g_at = plan.piece(strip.bytes(max_of(1, kLanes<C> / width)));
  const int64_t acc_at = plan.piece(int64_t(sizeof(C)) * (2 * width * width + kLanes<C>));
  Workspace workspace(plan.bytes * threads);
  if (workspace.dry()) return;
  int64_t next_range = 0;

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    char* const mine = workspace.data() + plan.bytes * omp_get_thread_num();
    for (int64_t range; (range = __atomic_fetch_add(&next_range, 1, __ATOMIC_RELAXED)) < ranges;) {
      const int64_t begin = range * in_blocks / ranges, end = (range + 1) * in_blocks / ranges;
      NormsTask<P, S> task = {.op = op,
                              .x = {reinterpret_cast<T*>(mine), width, strip.rows},
                              .g = {reinterpret_cast<T*>(mine + g_at), width, strip.rows},
                              .acc = reinterpret_cast<C*>(mine + acc_at),
                              .first_col = begin,
                              .last_col = end};
      pack_strips<P, Activation::none>(columns_from(rows_of<S>(op.x), begin * b), task.x, (end - begin) * per_block,
                                       op.x.cols - begin * b, op.x.rows, 0, nullptr, static_cast<C*>(nullptr));
      for (int64_t r = op.block_row_begin; r < op.block_row_end; ++r) task.block_row(r);
    }
  }
}

template <typename S> void norms_for(const GradientNorms& op, int threads) {
  const int64_t b = op.block_size;
  bool as_pairs = false;
#if defined(__AVX512BF16__)
  as_pairs = sizeof(S) == 2 && b >= kLanes<float>;
#endif
  // Of the gradient's multiply-adds: where both take equally long, measured. Gram matrices are always of floats. By the
  // whole matrix, whatever rows are asked for: slices add up to the same norms bit for bit.
  const double even = as_pairs ? 0.5 : 0.9;
  const int64_t out_blocks = ceil_div(op.grad_z.cols, b), in_blocks = ceil_div(op.x.cols, b);
  if (gram_work(op.x.rows, out_blocks, in_blocks, b) <
      even * double(op.x.rows) * double(out_blocks * b) * double(op.x.cols))
    return gram_norms<S>(op, rows_of<S>(op.grad_z), rows_of<S>(op.x), threads);
#if defined(__AVX512BF16__)
  if constexpr (sizeof(S) == 2)
    if (as_pairs) return norms_with<Pair, S>(op, threads);
#endif
  norms_with<Single<Compute<S>>, S>(op, threads);
}

template <typename S> void candidates_for(const CandidateGradients& op, int threads) {
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
  grad_values<S, Activation::none>(gradients, rows_of<S>(op.grad_z), rows_of<S>(op.x), threads);
}

} // namespace

void gradient_norms(const GradientNorms& op, int threads) {
  switch (op.dtype) {
  case DType::float32:
    return norms_for<float>(op, threads);
  case DType::bfloat16:
    return norms_for<BFloat16>(op, threads);
#if defined(SPARSENET_PORTABLE)
  case DType::float16:
    return norms_for<Half>(op, threads);
  case DType::float64:
    return norms_for<double>(op, threads);
#else
  default:
    return;
#endif
  }
}

void candidate_gradients(const CandidateGradients& op, int threads) {
  switch (op.dtype) {
  case DType::float32:
    return candidates_for<float>(op, threads);
  case DType::bfloat16:
    return candidates_for<BFloat16>(op, threads);
#if defined(SPARSENET_PORTABLE)
  case DType::float16:
    return candidates_for<Half>(op, threads);
  case DType::float64:
    return candidates_for<double>(op, threads);
#else
  default:
    return;
#endif
  }
}

// Declared in block_sparse_linear.cpp's half of this instruction set.
void linear_forward(const LinearForward& op, int threads);
void linear_backward(const LinearBackward& op, int threads);

} // namespace sparsenet::cpu::SPARSENET_ISA

namespace sparsenet::cpu {
#define SPARSENET_NAME_(x) #x
#define SPARSENET_NAME(x) SPARSENET_NAME_(x)
const KernelTable SPARSENET_ISA::kTable = {SPARSENET_NAME(SPARSENET_ISA), SPARSENET_ISA::linear_forward,
                                           SPARSENET_ISA::linear_backward, SPARSENET_ISA::gradient_norms,
                                           SPARSENET_ISA::candidate_gradients};
} // namespace sparsenet::cpu
