// The tensor-core vocabulary of the sm_80 kernels for bfloat16, float16, and float32 as tf32. What all three share is
// counted in bytes: a row of an instruction's k is 32 bytes (16 or 8 elements), a chunk of a copy 16 bytes, and
// ldmatrix moves 32-bit elements as pairs of halves. Only operands whose k runs down the rows differ: ldmatrix.trans
// for 16 bits, single words for 32, with a swizzle of their own that meets no bank conflicts.
#pragma once

#include "intrinsics.cuh"

namespace sparsenet::cuda {

template <typename T>
struct Fragment {
  static constexpr bool kWords = sizeof(T) == 4; // tf32
  static constexpr int kDepth = 32 / sizeof(T);  // k of one instruction
  static constexpr int kChunk = 16 / sizeof(T);  // elements of one asynchronous copy
  static constexpr int kPack = 4 / sizeof(T);    // elements of a register
};

// Chunk of a tile whose rows are consecutive k's; `row` is the row it lies in.
template <typename T>
SPARSENET_DEVICE int swizzled(int chunk, int row) {
  return Fragment<T>::kWords ? chunk ^ (row & 3) * 2 : chunk ^ (row & 7);
}

// float32 operands come from memory as they are; the instruction wants them rounded.
template <typename T, int kCount>
SPARSENET_DEVICE void round_operands(uint32_t (&words)[kCount]) {
  if constexpr (Fragment<T>::kWords) {
    SPARSENET_UNROLL
    for (int i = 0; i < kCount; ++i) words[i] = round_to_tf32(float_of(words[i]));
  }
}

// Four 8-row x 16-byte matrices whose k runs along the rows.
template <typename T>
SPARSENET_DEVICE void load_rows_x4(uint32_t (&words)[4], Shared<T> row) {
  load_matrix_x4(words, shared_cast<uint16_t>(row));
  round_operands<T>(words);
}

template <typename T>
SPARSENET_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (Fragment<T>::kWords)
    mma_m16n8k8_tf32(d, a, b0, b1);
  else
    mma_m16n8k16<T>(d, a, b0, b1);
}

// Where a thread's element lies in a tile of kColumns columns whose rows are k: its own word of fragment 0.
template <int kColumns>
SPARSENET_DEVICE int word_at(int row, int column) {
  return row * kColumns + swizzled<float>(column / 4, row) * 4 + column % 4;
}

// Fragments of 16 columns from `column` and kDepth rows from `k` of a [k][kColumns] tile, for the instruction's B side:
// words 0, 1 serve columns 0-7, words 2, 3 columns 8-15.
template <typename T, int kColumns>
SPARSENET_DEVICE void load_columns_b(uint32_t (&words)[4], Shared<T> tile, int k, int column) {
  const int lane = lane_index();
  if constexpr (Fragment<T>::kWords) {
    const int row = k + lane % 4, at = column + lane / 4;
    words[0] = round_to_tf32(tile[word_at<kColumns>(row, at)]);
    words[1] = round_to_tf32(tile[word_at<kColumns>(row + 4, at)]);
    words[2] = round_to_tf32(tile[word_at<kColumns>(row, at + 8)]);
    words[3] = round_to_tf32(tile[word_at<kColumns>(row + 4, at + 8)]);
  } else {
    const int row = k + lane / 8 % 2 * 8 + lane % 8, chunk = column / 8 + lane / 16;
    load_matrix_x4_trans(words, tile + row * kColumns + swizzled<T>(chunk, row) * 8);
  }
}

// The same 16 columns as the instruction's A side: its rows are the tile's columns.
template <typename T, int kColumns>
SPARSENET_DEVICE void load_columns_a(uint32_t (&words)[4], Shared<T> tile, int k, int column) {
  const int lane = lane_index();
  if constexpr (Fragment<T>::kWords) {
    const int row = k + lane % 4, at = column + lane / 4;
    words[0] = round_to_tf32(tile[word_at<kColumns>(row, at)]);
    words[1] = round_to_tf32(tile[word_at<kColumns>(row, at + 8)]);
    words[2] = round_to_tf32(tile[word_at<kColumns>(row + 4, at)]);
    words[3] = round_to_tf32(tile[word_at<kColumns>(row + 4, at + 8)]);
  } else {
    const int row = k + lane / 16 * 8 + lane % 8, chunk = column / 8 + lane / 8 % 2;
    load_matrix_x4_trans(words, tile + row * kColumns + swizzled<T>(chunk, row) * 8);
  }
}

} // namespace sparsenet::cuda
