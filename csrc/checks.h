// Every check of the native boundary, for both devices, and the one way native code refuses its input:
// SPARSENET_CHECK(condition, parts of a sentence...). What is checked here are sizes, codes and addresses; the contents
// of index arrays are checked where a pattern is made (cpu/block_pattern.cpp, cuda/block_pattern.cu).
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>

#include "types.h"

namespace sparsenet {

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str()); // pybind11 turns it into ValueError
}

#define SPARSENET_CHECK(condition, ...)                                                                                \
  do {                                                                                                                 \
    if (!(condition)) ::sparsenet::fail(__VA_ARGS__);                                                                  \
  } while (false)

inline constexpr int64_t kInt32Max = 2147483647;

// float32 in memory, but tensor cores may take its products of operands rounded to tf32's 10 bits: CUDA only.
inline constexpr DType kTf32{4};

// Both devices -----------------------------------------------------------------------------------------------------

inline bool is_block_size(int64_t size) {
  for (const int64_t allowed : {1, 4, 8, 16, 32, 64, 128})
    if (size == allowed) return true;
  return false;
}

inline void check_block_size(const char* op, int64_t block_size) {
  SPARSENET_CHECK(is_block_size(block_size), op, ": block_size must be 1, 4, 8, 16, 32, 64 or 128, got ", block_size);
}

// What can be said of a pattern's sizes before an index is read.
inline void check_pattern_sizes(int64_t crow_length, int64_t num_blocks, int64_t rows, int64_t cols,
                                int64_t block_size) {
  SPARSENET_CHECK(is_block_size(block_size), "BlockPattern: block_size must be one of 1, 4, 8, 16, 32, 64, 128, got ",
                  block_size);
  SPARSENET_CHECK(rows >= 0 && cols >= 0 && rows <= kInt32Max && cols <= kInt32Max,
                  "BlockPattern: shape must have sizes from 0 to 2147483647, got (", rows, ", ", cols, ")");
  const int64_t block_rows = (rows + block_size - 1) / block_size;
  SPARSENET_CHECK(crow_length == block_rows + 1, "BlockPattern: crow_indices must have ", block_rows + 1,
                  " entries (block rows + 1), got ", crow_length);
  SPARSENET_CHECK(num_blocks >= 0 && num_blocks <= kInt32Max,
                  "BlockPattern: there must be at most 2147483647 blocks, got ", num_blocks);
}

// compact_blocks: `num_rows` and `num_cols` are the lengths of op.rows and op.cols.
inline void check_gathered_sizes(const CompactBlocks& op, int64_t num_rows, int64_t num_cols) {
  SPARSENET_CHECK(num_rows == op.to.rows && num_cols == op.to.cols, "compact_blocks: rows and cols must have ",
                  op.to.rows, " and ", op.to.cols, " entries, got ", num_rows, " and ", num_cols);
}

// CUDA -------------------------------------------------------------------------------------------------------------
// The CPU's ops are called with what sparsenet.functional has checked. A GPU faults on an element that is not where its
// type may be, and a fault there ends the process: its ops check every operand once more.

inline void check_dtype(const char* op, DType dtype) {
  SPARSENET_CHECK(dtype >= DType::float32 && dtype <= kTf32, op,
                  ": dtype must be float32, bfloat16, float16, float64 or tf32, got code ",
                  static_cast<int32_t>(dtype));
}

inline void check_address(const char* op, const char* name, DType dtype, const void* data) {
  const int64_t bytes = element_bytes(dtype);
  const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data) % static_cast<uint64_t>(bytes));
  SPARSENET_CHECK(past == 0, op, ": ", name, " must start at a multiple of its element's ", bytes,
                  " bytes, got an address ", past, " past one");
}

inline void check_matrix(const char* op, const char* name, DType dtype, const Matrix& matrix, int64_t rows,
                         int64_t cols) {
  check_address(op, name, dtype, matrix.data);
  SPARSENET_CHECK(matrix.rows == rows && matrix.cols == cols, op, ": ", name, " must have shape [", rows, ", ", cols,
                  "], got [", matrix.rows, ", ", matrix.cols, "]");
}

// Rows of an input may lie anywhere, on each other too (an expanded tensor); those of an output may not overlap.
inline void check_output(const char* op, const char* name, DType dtype, const Matrix& matrix, int64_t rows,
                         int64_t cols) {
  check_matrix(op, name, dtype, matrix, rows, cols);
  SPARSENET_CHECK(matrix.stride >= cols || rows <= 1, op, ": ", name, " must have a row stride of at least ", cols,
                  ", got ", matrix.stride);
}

inline void check_linear(const PatternView& pattern, DType dtype, Activation activation) {
  constexpr const char* kOp = "block_sparse_linear";
  check_block_size(kOp, pattern.block_size);
  SPARSENET_CHECK(pattern.rows >= 0 && pattern.cols >= 0, kOp, ": shape must not be negative, got [", pattern.rows,
                  ", ", pattern.cols, "]");
  SPARSENET_CHECK(pattern.num_blocks >= 0 && pattern.num_blocks <= kInt32Max, kOp,
                  ": num_blocks must be in 0..2147483647, got ", pattern.num_blocks);
  check_dtype(kOp, dtype);
  SPARSENET_CHECK(activation >= Activation::none && activation <= Activation::silu, kOp,
                  ": activation must be none, relu, gelu or silu, got code ", static_cast<int32_t>(activation));
}

inline void check_linear_forward(const LinearForward& op) {
  constexpr const char* kOp = "block_sparse_linear";
  check_linear(op.pattern, op.dtype, op.activation);
  check_matrix(kOp, "x", op.dtype, op.x, op.x.rows, op.pattern.cols);
  check_output(kOp, "y", op.dtype, op.y, op.x.rows, op.pattern.rows);
  check_address(kOp, "values", op.dtype, op.values);
  check_address(kOp, "bias", op.dtype, op.bias);
  if (op.pre_activation.data != nullptr)
    check_output(kOp, "pre_activation", op.dtype, op.pre_activation, op.x.rows, op.pattern.rows);
}

inline void check_linear_backward(const LinearBackward& op) {
  constexpr const char* kOp = "block_sparse_linear";
  const int64_t batch = op.grad_y.rows;
  check_linear(op.pattern, op.dtype, op.activation);
  check_matrix(kOp, "grad_y", op.dtype, op.grad_y, batch, op.pattern.rows);
  if (op.activation != Activation::none) {
    SPARSENET_CHECK(op.saved.data != nullptr || batch == 0 || op.pattern.rows == 0, kOp,
                    ": saved must be given where there is an activation, got null");
    check_matrix(kOp, "saved", op.dtype, op.saved, batch, op.pattern.rows);
  }
  check_address(kOp, "values", op.dtype, op.values);
  check_address(kOp, "grad_values", op.dtype, op.grad_values);
  check_address(kOp, "grad_bias", op.dtype, op.grad_bias);
  if (op.grad_x.data != nullptr) check_output(kOp, "grad_x", op.dtype, op.grad_x, batch, op.pattern.cols);
  if (op.grad_values != nullptr) check_matrix(kOp, "x", op.dtype, op.x, batch, op.pattern.cols);
}

// x and the gradient before the activation, of gradient_norms and candidate_gradients.
inline void check_gradient_operands(const char* op, DType dtype, int64_t block_size, const Matrix& x,
                                    const Matrix& grad_z) {
  check_dtype(op, dtype);
  check_block_size(op, block_size);
  check_address(op, "x", dtype, x.data);
  check_address(op, "grad_output", dtype, grad_z.data);
  SPARSENET_CHECK(grad_z.rows == x.rows, op, ": grad_output must have as many rows as x, ", x.rows, ", got ",
                  grad_z.rows);
}

inline void check_gradient_norms(const GradientNorms& op) {
  constexpr const char* kOp = "block_gradient_squared_norms";
  check_gradient_operands(kOp, op.dtype, op.block_size, op.x, op.grad_z);
  const int64_t block_rows = (op.grad_z.cols + op.block_size - 1) / op.block_size;
  SPARSENET_CHECK(op.block_row_begin >= 0 && op.block_row_begin <= op.block_row_end && op.block_row_end <= block_rows,
                  kOp, ": block rows must be a range within 0..", block_rows, ", got ", op.block_row_begin, "..",
                  op.block_row_end);
}

inline void check_compact_blocks(const CompactBlocks& op) {
  constexpr const char* kOp = "compact_blocks";
  check_block_size(kOp, op.from.block_size);
  SPARSENET_CHECK(op.from.block_size == op.to.block_size, kOp, ": block_size must stay ", op.from.block_size, ", got ",
                  op.to.block_size);
  for (int64_t t = 0; t < op.num_tensors; ++t) {
    const int32_t bytes = op.tensors[t].element_bytes;
    SPARSENET_CHECK(bytes == 1 || bytes == 2 || bytes == 4 || bytes == 8 || bytes == 16, kOp,
                    ": elements must have 1, 2, 4, 8 or 16 bytes, got ", bytes);
  }
}

} // namespace sparsenet
