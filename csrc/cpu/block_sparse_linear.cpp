// block_sparse_linear on the CPU: how a call is computed.
//
//   forward       y[m][n]  = act(sum_k W[n][k] x[m][k] + bias[n])   over the active blocks of block row n / b
//   grad_input    dx[m][k] = sum_n W[n][k] dz[m][n]                 over the active blocks of block column k / b
//   grad_weight   dW[n][k] = sum_m dz[m][n] x[m][k]                 at the active blocks only
//   with dz = dy * act'(z), which is made while it is packed and never stored.
//
//   pass                     batch up to 16 (b >= 16)              larger batches
//   forward, grad_input      block_sparse_linear_small_batch.h     block_sparse_linear_product.h
//   grad_weight              block_sparse_linear_small_batch.h     block_sparse_linear_grad_weight.h
//
// Values are read in place, in the order of memory, except where a type has no arithmetic of its own (widened to float
// once a call) and where grad_input multiplies pairs of bfloat16 (each block transposed once a call).
//
// Every sum runs in one fixed order whatever the number of threads: results are bit-identical from run to run.
#include "block_sparse_linear_grad_weight.h"
#include "block_sparse_linear_product.h"
#include "block_sparse_linear_small_batch.h"

namespace sparsenet::cpu::SPARSENET_ISA {
namespace {

template <class P, typename S> constexpr bool kReadsValuesInPlace = sizeof(S) * P::kDepth == sizeof(typename P::Packed);

// float values of 16-bit ones.
template <typename S> void widen_values(const S* values, int64_t count, float* out, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t i = 0; i < count; i += 4096) {
    const int64_t end = min_of(count, i + 4096);
    for (int64_t j = i; j < end; j += kLanes<float>) store_narrow(out + j, load_wide(values + j, end - j), end - j);
  }
}

// Each block transposed, in the order of the transposed index: pairs of rows at a time.
template <int B> void transpose_blocks(const BFloat16* values, const PatternView& pattern, BFloat16* out, int threads) {
  constexpr int lanes = kLanes<float>;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t i = 0; i < pattern.num_blocks; ++i) {
    const BFloat16* from = values + int64_t(pattern.t_block[i]) * B * B;
    const BFloat16* next = values + int64_t(pattern.t_block[min_of(i + 1, pattern.num_blocks - 1)]) * B * B;
    BFloat16* to = out + i * B * B;
    for (int r = 0; r < B; r += 2 * lanes)
      for (int c = 0; c < B; c += lanes) {
        Vec<uint32_t> square[lanes] = {};
        for (int j = 0; j < lanes && r + 2 * j < B; ++j) {
          const BFloat16* const w = from + (r + 2 * j) * B + c;
          if (B <= 32 && c % (2 * lanes) == 0) { // larger blocks are streams that the processor sees itself
            __builtin_prefetch(next + (w - from), 0, 3);
            __builtin_prefetch(next + (w - from) + B, 0, 3);
          }
          square[j] = first_halves<B>(w) | (first_halves<B>(w + B) << 16);
        }
        transpose(square);
        constexpr size_t bytes = sizeof(BFloat16) * (B < 2 * lanes ? B : 2 * lanes);
        for (int j = 0; j < lanes && c + j < B; ++j) memcpy(to + (c + j) * B + r, &square[j], bytes);
      }
  }
}

int64_t value_count(const PatternView& pattern) { return pattern.num_blocks * pattern.block_size * pattern.block_size; }

template <class P, typename S> void forward_with(const LinearForward& op, int threads) {
  const PatternView& p = op.pattern;
  if constexpr (kHasSmallBatch)
    if (is_small_product<S>(op.x.rows, p.block_size)) return forward_small<P, S>(op, threads);
  constexpr bool in_place = kReadsValuesInPlace<P, S>;
  ArenaPlan plan;
  const auto widened = plan.shared<float>(in_place ? 0 : value_count(p));
  const Arena arena(plan);
  auto* values = static_cast<const typename P::Packed*>(op.values);
  if constexpr (!in_place) {
    values = arena.at(widened);
    if (!arena.dry()) widen_values(static_cast<const S*>(op.values), value_count(p), arena.at(widened), threads);
  }
  const auto product = product_of(p, false, values, true);
  const Walks<P> walks = walks_for<P, false>(p.block_size);
  const Rows<S> source = rows_of<S>(op.x);
  const Epilogue<S> out = forward_epilogue<S>(op);
  with_activation(op.activation, [&]<Activation A>() {
    multiply<P, Activation::none, A>(product, walks, source, op.x.rows, out, threads);
  });
}

template <class P, Activation A, typename S> void grad_input_with(const LinearBackward& op, int threads) {
  using T = typename P::Packed;
  const PatternView& p = op.pattern;
  if constexpr (kHasSmallBatch)
    if (is_small_product<S>(op.grad_y.rows, p.block_size)) return grad_input_small<P, A, S>(op, threads);
  constexpr bool transposed = P::kDepth == 2; // pairs are wanted along the sum
  constexpr bool in_place = kReadsValuesInPlace<P, S> && !transposed;
  ArenaPlan plan;
  const auto prepared = plan.shared<T>(in_place ? 0 : value_count(p) / P::kDepth);
  const Arena arena(plan);
  auto* values = static_cast<const T*>(op.values);
  if constexpr (!in_place) {
    values = arena.at(prepared);
    if (!arena.dry()) {
      const S* const from = static_cast<const S*>(op.values);
      if constexpr (transposed) {
        S* const to = reinterpret_cast<S*>(arena.at(prepared)); // a pair is two values
        with_block_size<4, 128>(p.block_size, [&]<int B>() { transpose_blocks<B>(from, p, to, threads); });
      } else {
        widen_values(from, value_count(p), arena.at(prepared), threads);
      }
    }
  }
  const auto product = product_of(p, true, values, transposed);
  const Walks<P> walks = walks_for<P, !transposed>(p.block_size);
  multiply<P, A, Activation::none>(product, walks, grad_z_rows<S>(op), op.grad_y.rows, grad_input_epilogue<S>(op),
                                   threads);
}

template <Activation A, typename S> void grad_weight_of(const LinearBackward& op, int threads) {
  const PatternView& p = op.pattern;
  const Rows<S> grad_z = grad_z_rows<S>(op), x = rows_of<S>(op.x);
  S* const grad_values = static_cast<S*>(op.grad_values);
  S* const grad_bias = static_cast<S*>(op.grad_bias);
  if constexpr (kHasSmallBatch)
    if (is_small(op.grad_y.rows, p.block_size))
      return grad_weight_small<A>(p, grad_z, x, op.grad_y.rows, grad_values, grad_bias, threads);
  const BlockGradients<S> gradients = {.crow = p.crow,
                                       .col = p.col,
                                       .block = nullptr,
                                       .count = grad_values != nullptr ? p.num_blocks : 0,
                                       .out_blocks = p.block_rows(),
                                       .in_blocks = p.block_cols(),
                                       .outputs = p.rows,
                                       .inputs = p.cols,
                                       .batch = op.grad_y.rows,
                                       .block_size = p.block_size,
                                       .values = grad_values,
                                       .bias = grad_bias};
  grad_weight<A>(gradients, grad_z, x, threads);
}

// Pairs of bfloat16 lie within a block.
bool fits_pairs(const PatternView& pattern) { return pattern.block_size > 1; }

template <typename S> void forward(const LinearForward& op, int threads) {
  with_operands<S>(fits_pairs(op.pattern), [&]<class P>() { forward_with<P, S>(op, threads); });
}

template <typename S> void backward(const LinearBackward& op, int threads) {
  with_activation(op.activation, [&]<Activation A>() {
    if (op.grad_x.data != nullptr)
      with_operands<S>(fits_pairs(op.pattern), [&]<class P>() { grad_input_with<P, A, S>(op, threads); });
    if (op.grad_values != nullptr || op.grad_bias != nullptr) grad_weight_of<A, S>(op, threads);
  });
}

} // namespace

constinit const Row<LinearForward> kLinearForward =
    by_dtype<LinearForward>([]<typename S>() -> Kernel<LinearForward> { return forward<S>; });
constinit const Row<LinearBackward> kLinearBackward =
    by_dtype<LinearBackward>([]<typename S>() -> Kernel<LinearBackward> { return backward<S>; });

} // namespace sparsenet::cpu::SPARSENET_ISA
