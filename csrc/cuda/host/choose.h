// Which kernel serves a call: the one place where arch, dtype, block size, batch and alignment are weighed.
#pragma once

#include <string>

#include "ops.h"

namespace sparsenet::cuda {

enum class ProductKernel { simt, rows_simt, sm80, small_batch_sm80 };
enum class GradWeightKernel { simt, small_simt, sm80 };

// forward (transposed = false) and grad_input (true); `a` is the gathered matrix, x or grad_z.
ProductKernel choose_product(DType dtype, int32_t block_size, int64_t batch, const Matrix& a, const void* values,
                             bool transposed);
// grad_weight, candidate gradients, norms.
GradWeightKernel choose_grad_weight(DType dtype, int32_t block_size, const Matrix& grad_z, const Matrix& x);

// An operand where the kernels read it: where the caller has it, or copied to scratch memory with rows on 16-byte
// boundaries. Before `place` a copy has no address; its alignment is that of address 0.
struct Operand {
  Matrix given;
  Matrix read;
  int64_t copy_bytes = 0; // 0: read where it is

  // Takes the copy's memory off the front of `scratch`.
  void place(char*& scratch) {
    if (copy_bytes == 0) return;
    read.data = scratch;
    scratch += copy_bytes;
  }
  void copy(DType dtype, Stream stream) const {
    if (copy_bytes > 0) copy_rows(dtype, given, read, stream);
  }
};
// Copied where that lets the tensor cores serve what they otherwise could not.
Operand operand(DType dtype, int32_t block_size, const Matrix& matrix);
// Written to scratch memory whatever its alignment.
Operand aligned_copy(DType dtype, const Matrix& matrix);

// Block rows that one CTA of a kernel works on.
int32_t rows_per_group(ProductKernel kernel, int32_t block_size);

// How often grad_weight cuts the batch so that a few blocks still fill the device, and the bytes of partial sums.
int32_t batch_splits(int64_t num_places, int32_t block_size, int64_t batch);
int64_t split_bytes(int32_t splits, int64_t num_places, int32_t block_size, DType dtype);

std::string name_of(ProductKernel kernel, DType dtype, bool transposed);
std::string name_of(GradWeightKernel kernel, DType dtype);

} // namespace sparsenet::cuda
