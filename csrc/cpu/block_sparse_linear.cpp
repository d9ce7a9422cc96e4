// block_sparse_linear on the CPU.
//
//   forward       y[m][n]  = act(sum_k W[n][k] x[m][k] + bias[n])       over the active blocks of block row n / b
//   grad_input    dx[m][k] = sum_n W[n][k] dz[m][n]                     over the active blocks of block column k / b
//   grad_values   dW[n][k] = sum_m dz[m][n] x[m][k]                     at the active blocks only
//   with dz = dy * act'(z).
//
// forward and grad_input are one loop (multiply): a task packs a few tiles of rows of x (or dz) feature by feature, so
// that they fit in L2, then walks all block rows (columns) past them. Values are read in place and streamed once per
// task. The finished tile, [output][row], is transposed back while bias and activation are applied.
// grad_values is described in block_sparse_linear_grad_weight.h.
//
// Every sum runs in one fixed order whatever the number of threads: results are bit-identical from run to run.
#include <omp.h>

#include "block_sparse_linear_grad_weight.h"
#include "isa.h"
#include "block_sparse_linear_small_batch.h"
#include "tile.h"
#include "workspace.h"

namespace sparsenet::cpu::SPARSENET_ISA {
namespace {

constexpr int64_t kPanelBytes = int64_t(1) << 19; // packed x of one task: a quarter of a common 2 MiB L2

// --- forward and grad_input ------------------------------------------------------------------------------------------

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
  int block_size;
  int max_vectors;
  Walk<P> by_vectors[9];
};

template <class P, int B, bool kTransposed> Walks<P> walks_of() {
  Walks<P> walks = {B, TileConfig<B>::kMaxVectors, {}};
  walks.by_vectors[1] = walk_block_rows<P, B, 1, kTransposed>;
  walks.by_vectors[2] = walk_block_rows<P, B, 2, kTransposed>;
  walks.by_vectors[3] = walk_block_rows<P, B, 3, kTransposed>;
  if constexpr (TileConfig<B>::kMaxVectors > 3) {
    walks.by_vectors[4] = walk_block_rows<P, B, 4, kTransposed>;
    walks.by_vectors[5] = walk_block_rows<P, B, 5, kTransposed>;
    walks.by_vectors[6] = walk_block_rows<P, B, 6, kTransposed>;
  }
  if constexpr (TileConfig<B>::kMaxVectors > 6) {
    walks.by_vectors[7] = walk_block_rows<P, B, 7, kTransposed>;
    walks.by_vectors[8] = walk_block_rows<P, B, 8, kTransposed>;
  }
  return walks;
}

template <class P, bool kTransposed> Walks<P> walks_for(int block_size) {
  switch (block_size) {
  case 1:
    if constexpr (P::kDepth == 1) return walks_of<P, 1, kTransposed>();
    break;
  case 4:
    return walks_of<P, 4, kTransposed>();
  case 8:
    return walks_of<P, 8, kTransposed>();
  case 16:
    return walks_of<P, 16, kTransposed>();
  case 32:
    return walks_of<P, 32, kTransposed>();
  case 64:
    return walks_of<P, 64, kTransposed>();
  }
  return walks_of<P, 128, kTransposed>();
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
  const int64_t tile_bytes = packed_inputs * walks.max_vectors * lanes * int64_t(sizeof(T));
  const Tiling tiling(rows, lanes, walks.max_vectors, tile_bytes, threads);
  threads = int(min_of(threads, tiling.tasks()));
  WorkspacePlan plan;
  plan.piece(tile_bytes * tiling.tiles_per_task());
  const int64_t acc_at = plan.piece(group * b * walks.max_vectors * lanes * int64_t(sizeof(C)));
  Workspace workspace(plan.bytes * threads);
  if (workspace.dry()) return;
  int64_t next_task = 0;

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    char* const mine = workspace.data() + plan.bytes * omp_get_thread_num();
    T* const x = reinterpret_cast<T*>(mine);
    C* const acc = reinterpret_cast<C*>(mine + acc_at);
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

// --- values in the form a policy computes with -----------------------------------------------------------------------

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

void transpose_values(const BFloat16* values, const PatternView& pattern, BFloat16* out, int threads) {
  const auto transpose_for = pattern.block_size == 4    ? transpose_blocks<4>
                             : pattern.block_size == 8  ? transpose_blocks<8>
                             : pattern.block_size == 16 ? transpose_blocks<16>
                             : pattern.block_size == 32 ? transpose_blocks<32>
                             : pattern.block_size == 64 ? transpose_blocks<64>
                                                        : transpose_blocks<128>;
  transpose_for(values, pattern, out, threads);
}

int64_t value_count(const PatternView& pattern) { return pattern.num_blocks * pattern.block_size * pattern.block_size; }

template <class P, typename S> void forward_with(const LinearForward& op, int threads) {
  const PatternView& p = op.pattern;
  if constexpr (kHasSmallBatch)
    if (is_small_product<S>(op.x.rows, p.block_size)) return forward_small<P, S>(op, threads);
  constexpr bool in_place = kReadsValuesInPlace<P, S>;
  Workspace widened(in_place ? 0 : value_count(p) * int64_t(sizeof(float)));
  auto* values = static_cast<const typename P::Packed*>(op.values);
  if constexpr (!in_place) {
    values = reinterpret_cast<float*>(widened.data());
    if (!widened.dry())
      widen_values(static_cast<const S*>(op.values), value_count(p), reinterpret_cast<float*>(widened.data()), threads);
  }
  const Product<typename P::Packed> product = product_of(p, false, values, true);
  const Walks<P> walks = walks_for<P, false>(p.block_size);
  const Rows<S> source = rows_of<S>(op.x);
  const Epilogue<S> out = forward_epilogue<S>(op);
  with_activation(op.activation, [&]<Activation A>() {
    multiply<P, Activation::none, A>(product, walks, source, op.x.rows, out, threads);
  });
}

template <class P, Activation A, typename S> void grad_input_with(const LinearBackward& op, int threads) {
  const PatternView& p = op.pattern;
  if constexpr (kHasSmallBatch)
    if (is_small_product<S>(op.grad_y.rows, p.block_size)) return grad_input_small<P, A, S>(op, threads);
  constexpr bool in_place = kReadsValuesInPlace<P, S> && P::kDepth == 1;
  Workspace prepared(in_place ? 0 : value_count(p) * int64_t(sizeof(typename P::Packed)) / P::kDepth);
  auto* values = static_cast<const typename P::Packed*>(op.values);
  if constexpr (P::kDepth == 2) {
    if (!prepared.dry())
      transpose_values(static_cast<const BFloat16*>(op.values), p, reinterpret_cast<BFloat16*>(prepared.data()),
                       threads);
    values = reinterpret_cast<const typename P::Packed*>(prepared.data());
  } else if constexpr (!in_place) {
    if (!prepared.dry())
      widen_values(static_cast<const S*>(op.values), value_count(p), reinterpret_cast<float*>(prepared.data()),
                   threads);
    values = reinterpret_cast<const float*>(prepared.data());
  }
  const Product<typename P::Packed> product = product_of(p, true, values, P::kDepth == 2);
  const Walks<P> walks = walks_for<P, P::kDepth == 1>(p.block_size);
  const Epilogue<S> out = grad_input_epilogue<S>(op);
  multiply<P, A, Activation::none>(product, walks, grad_z_rows<S>(op), op.grad_y.rows, out, threads);
}

template <class P, Activation A, typename S> void backward_with(const LinearBackward& op, int threads) {
  if (op.grad_x.data != nullptr) grad_input_with<P, A, S>(op, threads);
  if (op.grad_values == nullptr && op.grad_bias == nullptr) return;
  const PatternView& p = op.pattern;
  const Rows<S> x = rows_of<S>(op.x);
  if constexpr (kHasSmallBatch)
    if (is_small(op.grad_y.rows, p.block_size))
      return grad_values_small<A>(p, grad_z_rows<S>(op), x, op.grad_y.rows, static_cast<S*>(op.grad_values),
                                  static_cast<S*>(op.grad_bias), threads);
  const BlockGradients<S> gradients = {.crow = p.crow,
                                       .col = p.col,
                                       .block = nullptr,
                                       .count = op.grad_values != nullptr ? p.num_blocks : 0,
                                       .out_blocks = p.block_rows(),
                                       .in_blocks = p.block_cols(),
                                       .outputs = p.rows,
                                       .inputs = p.cols,
                                       .batch = op.grad_y.rows,
                                       .block_size = p.block_size,
                                       .values = static_cast<S*>(op.grad_values),
                                       .bias = static_cast<S*>(op.grad_bias)};
  grad_values<S, A>(gradients, grad_z_rows<S>(op), x, threads);
}

template <class P, typename S> void backward_for(const LinearBackward& op, int threads) {
  with_activation(op.activation, [&]<Activation A>() { backward_with<P, A, S>(op, threads); });
}

} // namespace

void linear_forward(const LinearForward& op, int threads) {
  switch (op.dtype) {
  case DType::float32:
    return forward_with<Single<float>, float>(op, threads);
  case DType::bfloat16:
#if defined(__AVX512BF16__)
    if (op.pattern.block_size > 1) return forward_with<Pair, BFloat16>(op, threads);
#endif
    return forward_with<Single<float>, BFloat16>(op, threads);
#if defined(SPARSENET_PORTABLE)
  case DType::float16:
    return forward_with<Single<float>, Half>(op, threads);
  case DType::float64:
    return forward_with<Single<double>, double>(op, threads);
#else
  default:
    return; // table_for() sends these to the portable table
#endif
  }
}

void linear_backward(const LinearBackward& op, int threads) {
  switch (op.dtype) {
  case DType::float32:
    return backward_for<Single<float>, float>(op, threads);
  case DType::bfloat16:
#if defined(__AVX512BF16__)
    if (op.pattern.block_size > 1) return backward_for<Pair, BFloat16>(op, threads);
#endif
    return backward_for<Single<float>, BFloat16>(op, threads);
#if defined(SPARSENET_PORTABLE)
  case DType::float16:
    return backward_for<Single<float>, Half>(op, threads);
  case DType::float64:
    return backward_for<Single<double>, double>(op, threads);
#else
  default:
    return;
#endif
  }
}

} // namespace sparsenet::cpu::SPARSENET_ISA
