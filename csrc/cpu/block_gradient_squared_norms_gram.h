// Squared norms of the blocks of the dense weight gradient, without the gradient:
//
//   || D^T X ||_F^2 = sum over pairs of rows (m, m') of <d_m, d_m'> <x_m, x_m'>
//
// for a block of outputs D [batch, b] and a block of inputs X [batch, b]. The Gram matrices of all blocks are made for
// 8 x 32 pairs of rows at a time; as lists of 256 numbers they are the operands of one small product:
//
//        32 rows of the batch from c, packed once per c           G: [out block][256]         norms += G H
//   8  +--------------------------------------------+
//   r  | . block of 8 x 32 inner products . . . . . |   ->                                    [out][in blocks]
//   o  +--------------------------------------------+             H: [in blocks / 2 vectors][256][2 vectors]
//   w
//   s  from a >= c, in place
//
// Pairs are symmetric: only tiles with a >= c are made, and those beside the diagonal count twice. Multiply-adds: about
// M^2/2 * (out blocks * in blocks + out + in), where the gradient itself takes M * out * in. Memory: 32 rows of both
// operands, two lists per block, and the norms. While the threads multiply one tile's lists they make the next one's:
// one barrier for each tile. Every sum runs in one fixed order: norms are bit-identical whatever the threads.
//
// Bytes for each norm and tile of 256 pairs, with 8 x 2 vectors of norms in registers (AVX2: 4 x 2): 256 * 4 / 8 of H
// from L1, where 16 KiB of it stay past all out blocks, 256 * 4 / 32 of G from L2 (AVX2: 4 and 16), and the norm itself
// read and written once for every 128 pairs.
//
// Measured: 86 % of the multiply-add peak of a core of an AMD EPYC (Zen 4) with AVX-512, of its own work (0.40 of the
// gradient's), at 4096 x 4096, b = 32, batch 512, float32, one thread. Two threads take 48 ms where half of their
// processor time would be 38: they wait for each other at the barriers.
#pragma once

#include <omp.h>

#include "arena.h"
#include "tile.h"

namespace sparsenet::cpu::SPARSENET_ISA {
namespace {

constexpr int64_t kGramRows = 8, kGramColumns = 32;
constexpr int64_t kPairs = kGramRows * kGramColumns;
constexpr int64_t kPairsAtOnce = 128; // of two vectors of H: 16 KiB, which stays in L1 past all out blocks
constexpr int64_t kLargestBlock = 128;
constexpr int64_t kOutBlocksPerTask = 64;

inline double gram_work(int64_t batch, int64_t out_blocks, int64_t in_blocks, int64_t block) { // multiply-adds
  const double columns = double(ceil_div(max_of(batch, 1), kGramColumns)), per_column = kGramColumns / kGramRows;
  const double tiles = per_column * columns * (columns + 1) / 2;
  return tiles * double(kPairs) * double(out_blocks * in_blocks + (out_blocks + in_blocks) * block);
}

// One operand: the columns from `origin` on, as whole blocks.
template <typename S> struct GramOperand {
  using C = Compute<S>;
  Rows<S> source; // from the first block on
  int64_t columns, batch, block, blocks;
  C* packed; // [blocks * block][kGramColumns]

  // Rows [c, c + kGramColumns) of block i.
  void pack(int64_t i, int64_t c) const {
    const int64_t from = i * block;
    pack_features<Single<C>, Activation::none>(columns_from(source, from), c, min_of(batch, c + kGramColumns),
                                               min_of(block, columns - from), block, kGramColumns, kGramColumns,
                                               packed + from * kGramColumns);
  }

  // pairs [kGramRows][kGramColumns] = factor * the inner products of rows [a, ...) with the packed ones, of block i.
  void inner_products(int64_t i, int64_t a, C factor, C* pairs) const {
    constexpr int lanes = kLanes<C>, outputs = kRegisters == 32 ? 8 : 4;
    static_assert(kGramRows % outputs == 0 && kGramColumns % (2 * lanes) == 0, "whole tiles of outer_products");
    C left[kGramRows * kLargestBlock];
    const int64_t from = i * block, count = min_of(block, columns - from);
    for (int64_t r = 0; r < kGramRows; ++r)
      for (int64_t k = 0; k < block; k += lanes)
        store(left + r * kLargestBlock + k,
              a + r < batch ? broadcast<C>(factor) *
                                  load_wide(source.data + (a + r) * source.stride + from + k, max_of(0, count - k))
                            : Vec<C>{});
    memset(pairs, 0, size_t(kPairs) * sizeof(C));
    const C* right = packed + from * kGramColumns;
    FetchQueue nothing;
    for (int64_t r = 0; r < kGramRows; r += outputs)
      for (int64_t m = 0; m < kGramColumns; m += 2 * lanes)
        outer_products<Single<C>, outputs>(left + r * kLargestBlock, {1, kLargestBlock}, right + m, right + m + lanes,
                                           kGramColumns, block, nothing, pairs + r * kGramColumns + m,
                                           pairs + r * kGramColumns + m + lanes, kGramColumns);
  }

  // The same of blocks [first, first + kLanes), side by side: out [pair][stride].
  void inner_products_of_blocks(int64_t first, int64_t a, C* out, int64_t stride) const {
    constexpr int lanes = kLanes<C>;
    C pairs[lanes * kPairs];
    for (int64_t i = 0; i < lanes; ++i) {
      if (first + i < blocks) {
        inner_products(first + i, a, C(1), pairs + i * kPairs);
      } else {
        memset(pairs + i * kPairs, 0, size_t(kPairs) * sizeof(C));
      }
    }
    for (int64_t pair = 0; pair < kPairs; pair += lanes) {
      Vec<C> square[lanes];
      for (int i = 0; i < lanes; ++i) square[i] = load(pairs + i * kPairs + pair);
      transpose(square);
      for (int i = 0; i < lanes; ++i) store(out + (pair + i) * stride, square[i]);
    }
  }
};

template <typename S> struct GramNorms {
  using C = Compute<S>;
  static constexpr int kBlocks = 2 * kLanes<C>, kOutputs = kRegisters == 32 ? 8 : 4;
  GramOperand<S> d, x;
  C* lists; // of even and of odd tiles
  C* sums;  // [padded_out_blocks][padded_in_blocks]
  int64_t padded_out_blocks() const { return ceil_div(d.blocks, kOutputs) * kOutputs; }
  int64_t padded_in_blocks() const { return ceil_div(x.blocks, kBlocks) * kBlocks; }
  int64_t list_elements() const { return (padded_out_blocks() + padded_in_blocks()) * kPairs; }
  C* g(int64_t a) const { return lists + a / kGramRows % 2 * list_elements(); } // [padded_out_blocks][kPairs]
  C* h(int64_t a) const { return g(a) + padded_out_blocks() * kPairs; } // [padded_in_blocks / kBlocks][kPairs][kBlocks]

  // All pairs of rows; to be called by every thread of a team.
  void run() const {
    for (int64_t c = 0; c < d.batch; c += kGramColumns) {
#pragma omp for schedule(dynamic, 4)
      for (int64_t i = 0; i < d.blocks + x.blocks; ++i) i < d.blocks ? d.pack(i, c) : x.pack(i - d.blocks, c);
      make_lists(c, c);
#pragma omp barrier
      for (int64_t a = c; a < d.batch; a += kGramRows) {
        if (a + kGramRows < d.batch) make_lists(a + kGramRows, c);
        add_products(a);
#pragma omp barrier
      }
    }
  }

private:
  void make_lists(int64_t a, int64_t c) const {
    const int64_t d_groups = ceil_div(d.blocks, kLanes<C>), x_groups = ceil_div(x.blocks, kLanes<C>);
    const C times = a < c + kGramColumns ? C(1) : C(2);
#pragma omp for schedule(dynamic) nowait
    for (int64_t group = 0; group < d_groups + x_groups; ++group) {
      const int64_t first = (group < d_groups ? group : group - d_groups) * kLanes<C>;
      if (group >= d_groups) {
        x.inner_products_of_blocks(first, a, h(a) + first / kBlocks * kBlocks * kPairs + first % kBlocks, kBlocks);
      } else {
        for (int64_t i = first; i < min_of(first + kLanes<C>, d.blocks); ++i)
          d.inner_products(i, a, times, g(a) + i * kPairs);
      }
    }
  }

  void add_products(int64_t a) const {
    const int64_t row_tasks = ceil_div(d.blocks, kOutBlocksPerTask), column_groups = padded_in_blocks() / kBlocks;
#pragma omp for schedule(dynamic) nowait
    for (int64_t task = 0; task < row_tasks * column_groups; ++task)
      add_product(a, task % row_tasks * kOutBlocksPerTask, task / row_tasks);
  }

  // Out blocks [first, first + kOutBlocksPerTask) times one group of in blocks.
  void add_product(int64_t a, int64_t first, int64_t column_group) const {
    const int64_t end = min_of(first + kOutBlocksPerTask, padded_out_blocks()), stride = padded_in_blocks();
    FetchQueue nothing;
    for (int64_t pair = 0; pair < kPairs; pair += kPairsAtOnce) {
      const C* right = h(a) + (column_group * kPairs + pair) * kBlocks;
      for (int64_t row = first; row < end; row += kOutputs) {
        C* at = sums + row * stride + column_group * kBlocks;
        outer_products<Single<C>, kOutputs>(g(a) + row * kPairs + pair, {1, kPairs}, right, right + kLanes<C>, kBlocks,
                                            kPairsAtOnce, nothing, at, at + kLanes<C>, stride);
      }
    }
  }
};

// norms [out_blocks, in_blocks] for the block rows of grad_z from block_row_begin on.
template <typename S>
void gram_norms(const GradientNorms& op, const Rows<S>& grad_z, const Rows<S>& x, int threads) {
  using C = Compute<S>;
  const int64_t b = op.block_size, origin = op.block_row_begin * b;
  const int64_t out_blocks = op.block_row_end - op.block_row_begin, in_blocks = ceil_div(op.x.cols, b);
  GramNorms<S> norms = {.d = {columns_from(grad_z, origin), op.grad_z.cols - origin, op.x.rows, b, out_blocks, nullptr},
                        .x = {x, op.x.cols, op.x.rows, b, in_blocks, nullptr},
                        .lists = nullptr,
                        .sums = nullptr};
  const int64_t stride = norms.padded_in_blocks(), sums_elements = norms.padded_out_blocks() * stride;
  ArenaPlan plan;
  const auto d_piece = plan.shared<C>(out_blocks * b * kGramColumns);
  const auto x_piece = plan.shared<C>(in_blocks * b * kGramColumns);
  const auto lists = plan.shared<C>(2 * norms.list_elements()), sums = plan.shared<C>(sums_elements);
  const Arena arena(plan);
  if (arena.dry()) return;
  norms.d.packed = arena.at(d_piece);
  norms.x.packed = arena.at(x_piece);
  norms.lists = arena.at(lists);
  norms.sums = arena.at(sums);
  // Blocks that only fill a group stay zero.
  memset(norms.lists, 0, size_t(2 * norms.list_elements()) * sizeof(C));
  memset(norms.sums, 0, size_t(sums_elements) * sizeof(C));

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    norms.run();
#pragma omp for schedule(static)
    for (int64_t i = 0; i < out_blocks; ++i)
      for (int64_t j = 0; j < in_blocks; ++j) {
        const C sum = norms.sums[i * stride + j];
        op.norms[i * in_blocks + j] = float(sum < 0 ? C(0) : sum); // rounding may take a vanishing norm below zero
      }
  }
}

} // namespace
} // namespace sparsenet::cpu::SPARSENET_ISA
