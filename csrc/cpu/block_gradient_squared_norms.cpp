// block_gradient_squared_norms on the CPU, and the gradient of a list of candidate blocks.
//
//   norms[i][j] = || sum_m dz[m][i-th block of outputs]^T x[m][j-th block of inputs] ||_F^2
//
// The dense gradient's blocks are made two at a time in L1, squared, summed and forgotten. A task packs a range of
// block columns of x for the whole batch (at most kNormStripsBytes, at least one strip), then walks the block rows past
// it.
//
// Where the batch is small against b^2 the norms come from Gram matrices instead: gram_norms.h.
#include "grad_values.h"
#include "gram_norms.h"
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

template <class P, typename S> void norms_with(const GradientNorms& op, int threads) {
  using T = typename P::Packed;
  using C = typename P::Accumulator;
  const int64_t b = op.block_size, bb = b * b, in_blocks = ceil_div(op.x.cols, b), group = max_of(1, kLanes<C> / b);
  const int64_t rows = ceil_div(max_of(op.x.rows, 1), 16) * 16, strip_bytes = strips_bytes<P>(1, b, rows);
  const int64_t fitting = max_of(1, kNormStripsBytes / strip_bytes);
  const int64_t ranges = max_of(ceil_div(in_blocks, fitting), min_of(threads, in_blocks));
  const int64_t widest = ceil_div(in_blocks, ranges);
  threads = int(min_of(threads, ranges));
  WorkspacePlan plan;
  plan.piece(widest * strip_bytes);
  const int64_t g_at = plan.piece(group * strip_bytes);
  const int64_t acc_at = plan.piece(2 * bb * int64_t(sizeof(C)));
  Workspace workspace(plan.bytes * threads);
  if (workspace.dry()) return;
  const SumBlocks<P> sum = sum_blocks_for<P>(b);
  int64_t next_range = 0;

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    char* const mine = workspace.data() + plan.bytes * omp_get_thread_num();
    const Strips<P> xs = {reinterpret_cast<T*>(mine), b, rows};
    const Strips<P> gs = {reinterpret_cast<T*>(mine + g_at), b, rows};
    C* const acc = reinterpret_cast<C*>(mine + acc_at);
    FetchQueue fetch; // empty: everything a range needs is at hand
    for (int64_t range; (range = __atomic_fetch_add(&next_range, 1, __ATOMIC_RELAXED)) < ranges;) {
      const int64_t col_begin = range * in_blocks / ranges, col_end = (range + 1) * in_blocks / ranges;
      pack_strips<P, Activation::none>(columns_from(rows_of<S>(op.x), col_begin * b), xs,
                                       min_of(col_end * b, op.x.cols) - col_begin * b, op.x.rows, 0, nullptr,
                                       static_cast<C*>(nullptr));
      for (int64_t i = op.block_row_begin; i < op.block_row_end; ++i) {
        const int64_t first = op.block_row_begin + (i - op.block_row_begin) / group * group;
        if (i == first)
          pack_strips<P, Activation::none>(columns_from(rows_of<S>(op.grad_z), i * b), gs,
                                           min_of((i + group) * b, op.grad_z.cols) - i * b, op.x.rows, 0, nullptr,
                                           static_cast<C*>(nullptr));
        float* out = op.norms + (i - op.block_row_begin) * in_blocks;
        for (int64_t j = col_begin; j < col_end; j += 2) {
          const bool two = j + 1 < col_end;
          memset(acc, 0, size_t(2 * bb) * sizeof(C));
          sum(gs.strip(i - first), xs.strip(j - col_begin), two ? xs.strip(j + 1 - col_begin) : nullptr, rows, fetch,
              acc, two ? acc + bb : nullptr);
          out[j] = squared_norm(acc, bb);
          if (two) out[j + 1] = squared_norm(acc + bb, bb);
        }
      }
    }
  }
}

template <typename S> void norms_for(const GradientNorms& op, int threads) {
  const int64_t b = op.block_size;
  const int64_t out_blocks = ceil_div(op.grad_z.cols, b), in_blocks = ceil_div(op.x.cols, b);
  // By the whole matrix, whatever rows are asked for: slices add up to the same norms bit for bit.
  if (gram_work(op.x.rows, out_blocks, in_blocks, b) <
      0.8 * double(op.x.rows) * double(out_blocks * b) * double(op.x.cols))
    return gram_norms<S>(op, rows_of<S>(op.grad_z), rows_of<S>(op.x), threads);
#if defined(__AVX512BF16__)
  if constexpr (sizeof(S) == 2)
    if (op.block_size >= kLanes<float>) return norms_with<Pair, S>(op, threads);
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
                                       .values = static_cast<S*>(op.grads),
                                       .bias = nullptr};
  grad_values<S, Activation::none>(gradients, rows_of<S>(op.grad_z), rows_of<S>(op.x), b, threads);
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
