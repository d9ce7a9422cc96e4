// Block norms of a gradient by Gram matrices, for batches well below b^2.
//
//   || D_i^T X_j ||_F^2 = < X_j X_j^T, D_i D_i^T > = sum over rows m, n of (X_j X_j^T)[m][n] * (D_i D_i^T)[m][n]
//
// with X_j [M, b] a block column of x and D_i [M, b] one of grad_z. The pairs (m, n) are cut into square tiles of rows;
// per tile the threads first make that part of every block's Gram matrix, kept as [pair][block], then add the product
// of the two lists, [pair][out block] and [pair][in block], to norms [out block][in block]. By symmetry only tiles on
// and below the diagonal are made; those below count twice. Work: M^2/2 * (out blocks * in blocks + out + in)
// multiply-adds, where the gradient itself takes M * out * in. Memory: one tile of every Gram matrix.
#pragma once

#include <omp.h>

#include "tile.h"
#include "workspace.h"

namespace sparsenet::cpu::SPARSENET_ISA {
namespace {

constexpr int64_t kGramTile = 32; // rows of the batch on a side
constexpr int64_t kPairs = kGramTile * kGramTile;

inline double gram_work(int64_t batch, int64_t out_blocks, int64_t in_blocks, int64_t block) { // multiply-adds
  const int64_t tiles = ceil_div(max_of(batch, 1), kGramTile);
  return 0.5 * double(tiles * (tiles + 1) * kPairs) * double(out_blocks * in_blocks + (out_blocks + in_blocks) * block);
}

// gram [kGramTile][kGramTile] = rows [a, ...) of one block of `source` times its rows [c, ...), transposed.
template <class P, typename S>
void gram_tile(const Rows<S>& source, int64_t features, int64_t batch, int64_t a, int64_t c, int64_t block,
               typename P::Packed* packed, typename P::Accumulator* gram) {
  using T = typename P::Packed;
  constexpr int lanes = kLanes<T>, outputs = kRegisters == 32 ? 8 : 4;
  constexpr auto none = Activation::none;
  static_assert(kGramTile % (2 * lanes) == 0 && kGramTile % outputs == 0,
                "a tile is whole groups of outputs and vectors");
  T* const left = packed;
  T* const right = a == c ? packed : packed + block * kGramTile;
  pack_features<P, none>(source, a, min_of(batch, a + kGramTile), features, block, kGramTile, kGramTile, left);
  if (a != c)
    pack_features<P, none>(source, c, min_of(batch, c + kGramTile), features, block, kGramTile, kGramTile, right);
  FetchQueue nothing;
  memset(gram, 0, size_t(kPairs) * sizeof(*gram));
  for (int64_t m = 0; m < kGramTile; m += outputs)
    for (int64_t n = 0; n < kGramTile; n += 2 * lanes)
      outer_products<P, outputs>(left + m, {kGramTile, 1}, right + n, right + n + lanes, kGramTile, block, nothing,
                                 gram + m * kGramTile + n, gram + m * kGramTile + n + lanes, kGramTile);
}

// One operand's Gram matrices, [pair][block]. Rows are an odd number of vectors long, so that they do not fall into the
// same cache sets.
template <typename C> struct Grams {
  C* data;
  int64_t blocks;
  static int64_t stride_for(int64_t blocks) { return (ceil_div(blocks, 2 * kLanes<C>) * 2 + 1) * kLanes<C>; }
  int64_t stride() const { return stride_for(blocks); }
};

// The Gram tiles (a, c) of blocks [first, first + lanes) of an operand whose first block is `origin`.
template <class P, typename S>
void gram_tiles(const Rows<S>& source, int64_t columns, int64_t origin, int64_t batch, int64_t a, int64_t c,
                int64_t first, int64_t block, typename P::Packed* scratch,
                const Grams<typename P::Accumulator>& grams) {
  using C = typename P::Accumulator;
  constexpr int lanes = kLanes<C>;
  C* const tiles = scratch + 2 * block * kGramTile; // [lanes][kPairs]
  for (int64_t i = 0; i < lanes; ++i) {
    const int64_t column = (origin + first + i) * block;
    if (first + i < grams.blocks) {
      gram_tile<P>(columns_from(source, column), min_of(block, columns - column), batch, a, c, block, scratch,
                   tiles + i * kPairs);
    } else {
      memset(tiles + i * kPairs, 0, size_t(kPairs) * sizeof(C));
    }
  }
  for (int64_t pair = 0; pair < kPairs; pair += lanes) {
    Vec<C> square[lanes];
    for (int i = 0; i < lanes; ++i) square[i] = load(tiles + i * kPairs + pair);
    transpose(square);
    for (int i = 0; i < lanes; ++i) store(grams.data + (pair + i) * grams.stride() + first, square[i]);
  }
}

// sums [.][stride of x] of outputs [row, row + kOutputs) and two vectors of inputs += the product of the lists.
template <class P>
void multiply_grams(const Grams<typename P::Accumulator>& d, const Grams<typename P::Accumulator>& x, int64_t row,
                    int64_t col, typename P::Accumulator* sums) {
  constexpr int lanes = kLanes<typename P::Packed>, outputs = kRegisters == 32 ? 8 : 4;
  FetchQueue nothing;
  auto* at = sums + row * x.stride() + col;
  outer_products<P, outputs>(d.data + row, {d.stride(), 1}, x.data + col, x.data + col + lanes, x.stride(), kPairs, nothing,
                             at, at + lanes, x.stride());
}

// norms [out_blocks, in_blocks] for the block rows of grad_z from block_row_begin on.
template <typename S>
void gram_norms(const GradientNorms& op, const Rows<S>& grad_z, const Rows<S>& x, int threads) {
  using P = Single<Compute<S>>;
  using C = Compute<S>;
  constexpr int lanes = kLanes<C>, outputs = kRegisters == 32 ? 8 : 4;
  const int64_t b = op.block_size, out_blocks = op.block_row_end - op.block_row_begin;
  const int64_t in_blocks = ceil_div(op.x.cols, b), tiles = ceil_div(max_of(op.x.rows, 1), kGramTile);
  const int64_t d_stride = Grams<C>::stride_for(out_blocks), x_stride = Grams<C>::stride_for(in_blocks);
  WorkspacePlan pieces;
  const int64_t d_at = pieces.piece(kPairs * d_stride * int64_t(sizeof(C)));
  const int64_t x_at = pieces.piece(kPairs * x_stride * int64_t(sizeof(C)));
  const int64_t sums_at = pieces.piece(d_stride * x_stride * int64_t(sizeof(C)));
  const int64_t scratch_bytes = (2 * b * kGramTile + lanes * kPairs) * int64_t(sizeof(C));
  const int64_t scratch_at = pieces.piece(scratch_bytes * threads);
  Workspace workspace(pieces.bytes);
  if (workspace.dry()) return;
  const Grams<C> d_grams = {reinterpret_cast<C*>(workspace.data() + d_at), out_blocks};
  const Grams<C> x_grams = {reinterpret_cast<C*>(workspace.data() + x_at), in_blocks};
  C* const sums = reinterpret_cast<C*>(workspace.data() + sums_at);
  memset(sums, 0, size_t(d_stride * x_stride) * sizeof(C));
  const int64_t d_groups = ceil_div(out_blocks, lanes), x_groups = ceil_div(in_blocks, lanes);
  const int64_t row_groups = ceil_div(out_blocks, outputs), col_groups = ceil_div(in_blocks, 2 * lanes);
  int64_t next_group = 0, next_product = 0;

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    C* const scratch = reinterpret_cast<C*>(workspace.data() + scratch_at + scratch_bytes * omp_get_thread_num());
    const auto one_tile = [&](int64_t a, int64_t c) {
      for (int64_t i; (i = __atomic_fetch_add(&next_group, 1, __ATOMIC_RELAXED)) < d_groups + x_groups;)
        if (i < d_groups) {
          gram_tiles<P>(grad_z, op.grad_z.cols, op.block_row_begin, op.x.rows, a * kGramTile, c * kGramTile, i * lanes,
                        b, scratch, d_grams);
        } else {
          gram_tiles<P>(x, op.x.cols, 0, op.x.rows, a * kGramTile, c * kGramTile, (i - d_groups) * lanes, b, scratch,
                        x_grams);
        }
#pragma omp barrier
#pragma omp single nowait
      next_group = 0;
      for (int64_t i; (i = __atomic_fetch_add(&next_product, 1, __ATOMIC_RELAXED)) < row_groups * col_groups;)
        multiply_grams<P>(d_grams, x_grams, i % row_groups * outputs, i / row_groups * 2 * lanes, sums);
#pragma omp barrier
#pragma omp single nowait
      next_product = 0;
    };
    for (int64_t a = 1; a < tiles; ++a)
      for (int64_t c = 0; c < a; ++c) one_tile(a, c);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < d_stride * x_stride; ++i) sums[i] *= 2;
    for (int64_t a = 0; a < tiles; ++a) one_tile(a, a);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < out_blocks; ++i)
      for (int64_t j = 0; j < in_blocks; ++j) {
        const C sum = sums[i * x_stride + j];
        op.norms[i * in_blocks + j] = float(sum < 0 ? C(0) : sum); // rounding may take a vanishing norm below zero
      }
  }
}

} // namespace
} // namespace sparsenet::cpu::SPARSENET_ISA
