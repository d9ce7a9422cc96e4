// Plain views that cross from the bindings to the kernels. No framework type appears below this line:
// a pointer, sizes, a stride in elements, a dtype, a stream.
#pragma once

#include <cstdint>

namespace sparsenet {

enum class DType : int32_t { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };

constexpr int64_t element_bytes(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::bfloat16 || dtype == DType::float16 ? 2 : 4;
}

enum class Activation : int32_t { none = 0, relu = 1, gelu = 2, silu = 3 };

// Row-major [rows, cols]; columns are contiguous, rows lie `stride` elements apart. data may be null: "not wanted".
struct Matrix {
  void* data = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;
};

// A validated block pattern of a matrix [rows = out, cols = in]. Blocks are numbered in row order; block i sits at
// block row row[i], block column col[i], and values[i] is its [b, b] content (row-major: [out, in]).
// The transposed index lists, block column by block column, the same blocks: their block row and their number.
struct PatternView {
  const int32_t* crow = nullptr;    // [block_rows() + 1]
  const int32_t* col = nullptr;     // [num_blocks]
  const int32_t* row = nullptr;     // [num_blocks]
  const int32_t* t_crow = nullptr;  // [block_cols() + 1]
  const int32_t* t_row = nullptr;   // [num_blocks] block row of the transposed index's entries
  const int32_t* t_block = nullptr; // [num_blocks] their block number (where their values are)
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t num_blocks = 0;
  int32_t block_size = 1;

  int64_t block_rows() const { return (rows + block_size - 1) / block_size; }
  int64_t block_cols() const { return (cols + block_size - 1) / block_size; }
};

// y = activation(x W^T + bias); pre_activation (x W^T + bias) is written too where it is not null.
struct LinearForward {
  PatternView pattern;
  DType dtype = DType::float32;
  Activation activation = Activation::none;
  Matrix x;                     // [M, cols]
  const void* values = nullptr; // [num_blocks, b, b]
  const void* bias = nullptr;   // [rows] or null
  Matrix y;                     // [M, rows]
  Matrix pre_activation;        // [M, rows] or null
};

// Gradients of LinearForward. `saved` is what the activation's derivative needs: y for relu, the pre-activation for
// gelu and silu, null for none. Every output may be null: it is then not computed.
struct LinearBackward {
  PatternView pattern;
  DType dtype = DType::float32;
  Activation activation = Activation::none;
  Matrix grad_y;                // [M, rows]
  Matrix saved;                 // [M, rows] or null
  Matrix x;                     // [M, cols]; read only for grad_values
  const void* values = nullptr; // [num_blocks, b, b]; read only for grad_x
  Matrix grad_x;                // [M, cols] or null
  void* grad_values = nullptr;  // [num_blocks, b, b] or null
  void* grad_bias = nullptr;    // [rows] or null
};

// Squared Frobenius norm of each [b, b] block of the dense gradient grad_z^T x, for block rows
// [block_row_begin, block_row_end), written to norms [block_row_end - block_row_begin, block_cols] (float32).
struct GradientNorms {
  DType dtype = DType::float32;
  int32_t block_size = 1;
  Matrix x;      // [M, in]
  Matrix grad_z; // [M, out], the gradient before the activation
  int64_t block_row_begin = 0;
  int64_t block_row_end = 0;
  float* norms = nullptr;
};

// The dense gradient's blocks at a list of places, given by block row: grads[block[i]] is the block of grad_z^T x at
// (its row, col[i]).
struct CandidateGradients {
  DType dtype = DType::float32;
  int32_t block_size = 1;
  Matrix x;                       // [M, in]
  Matrix grad_z;                  // [M, out]
  const int32_t* crow = nullptr;  // [ceil(out / b) + 1]
  const int32_t* col = nullptr;   // [num_places], ascending within a row
  const int32_t* block = nullptr; // [num_places] where the place's gradient goes
  int64_t num_places = 0;
  void* grads = nullptr; // [num_places, b, b], same dtype
};

// One tensor [num_blocks, b, b] of compact_blocks before and after: values, or a moment, or a mask; of any type.
struct GatheredBlocks {
  const void* from = nullptr; // [from.num_blocks, b, b]
  void* to = nullptr;         // [to.num_blocks, b, b]
  int32_t element_bytes = 4;
};

// to[i, j] = from[rows[i], cols[j]] inside the blocks of `to`; zero where `from` has no block and outside the matrix.
struct CompactBlocks {
  PatternView from;
  PatternView to;                // same block size
  const int32_t* rows = nullptr; // [to.rows] old row of each new one
  const int32_t* cols = nullptr; // [to.cols] old column of each new one
  const GatheredBlocks* tensors = nullptr;
  int64_t num_tensors = 0;
};

} // namespace sparsenet
