// compact_blocks: to[i, j] = from[rows[i], cols[j]] for values and every optimizer moment, in one pass, on any
// architecture.
//
//   new block n (b x b)          old matrix
//   +-----------------+          row rows[i], column cols[j]: block (rows[i] / b, cols[j] / b), found by binary search
//   | thread: one     |   <---   in its block row's columns; -1 where there is none. Found once, used for all tensors.
//   | element (i, j)  |
//   +-----------------+          Lanes run along j, so kept columns that were neighbours are read in whole sectors.
//
// Bytes moved: each new element is written once and read once per tensor; besides, 8 bytes of row and column numbers
// and about log2(blocks of the row) index words (from L1) per element. Nothing is computed, so elements may be of any
// type.
#pragma once

#include "../types.h"
#include "device/elements.cuh"

namespace sparsenet::cuda {

struct CompactConfig {
  static constexpr int kMostTensors = 8; // of one launch: value, gradient, and more moments than any optimizer has
};

struct CompactParams {
  const int32_t* from_crow;
  const int32_t* from_col;
  const int32_t* to_row;
  const int32_t* to_col;
  const int32_t* rows; // [to_rows]
  const int32_t* cols; // [to_cols]
  int64_t to_rows;
  int64_t to_cols;
  int64_t num_blocks;  // of the new pattern
  int32_t block_shift; // log2 of the block size
  int32_t num_tensors;
  GatheredBlocks tensors[CompactConfig::kMostTensors];
};

// Element number in the old storage of element (row, col) of the old matrix, or -1.
SPARSENET_DEVICE int64_t find_element(const CompactParams& p, int32_t row, int32_t col) {
  const int shift = p.block_shift, inside = (1 << shift) - 1;
  const int32_t* pointer = p.from_crow + (row >> shift);
  const int32_t begin = load_global(pointer), end = load_global(pointer + 1);
  const int32_t block_col = col >> shift;
  const int64_t block = begin + lower_bound(p.from_col + begin, end - begin, block_col);
  if (block == end || load_global(p.from_col + block) != block_col) return -1;
  return (((block << shift) + (row & inside)) << shift) + (col & inside);
}

template <typename Word>
SPARSENET_DEVICE void move_element(const GatheredBlocks& tensor, int64_t source, int64_t target) {
  Word word{};
  if (source >= 0) word = load_global(static_cast<const Word*>(tensor.from) + source);
  store_global(static_cast<Word*>(tensor.to) + target, word);
}

static SPARSENET_KERNEL(ElementConfig::kThreads) compact_blocks_kernel(const CompactParams p) {
  const int shift = p.block_shift, inside = (1 << shift) - 1;
  const int64_t target = element_index(), block = target >> 2 * shift;
  if (block >= p.num_blocks) return;
  const int64_t i = (static_cast<int64_t>(load_global(p.to_row + block)) << shift) + (target >> shift & inside);
  const int64_t j = (static_cast<int64_t>(load_global(p.to_col + block)) << shift) + (target & inside);
  int64_t source = -1; // outside the new matrix: zero
  if (i < p.to_rows && j < p.to_cols) source = find_element(p, load_global(p.rows + i), load_global(p.cols + j));
  for (int t = 0; t < p.num_tensors; ++t) {
    const GatheredBlocks tensor = p.tensors[t];
    switch (tensor.element_bytes) {
    case 1:
      move_element<uint8_t>(tensor, source, target);
      break;
    case 2:
      move_element<uint16_t>(tensor, source, target);
      break;
    case 4:
      move_element<uint32_t>(tensor, source, target);
      break;
    case 8:
      move_element<uint64_t>(tensor, source, target);
      break;
    default:
      move_element<Word16>(tensor, source, target);
      break;
    }
  }
}

} // namespace sparsenet::cuda
