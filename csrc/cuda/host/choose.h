// Which kernel serves a call: the one place where arch, dtype, block size, batch and alignment are weighed.
#pragma once

#include <string>

#include "ops.h"

namespace sparsenet::cuda {

enum class ProductKernel { simt, rows_simt, sm80, small_sm80 };
enum class OuterKernel { simt, small_simt, sm80 };

// forward (transposed = false) and grad_input (true); `a` is the gathered matrix, x or grad_z.
ProductKernel choose_product(DType dtype, int32_t block_size, int64_t batch, const Matrix& a, const void* values,
                             bool transposed);
// grad_weight, candidate gradients, norms.
OuterKernel choose_outer(DType dtype, int32_t block_size, const Matrix& g, const Matrix& x);

// Whether a copy with rows on 16-byte boundaries lets the tensor cores serve what they otherwise could not.
bool worth_aligning(DType dtype, int32_t block_size, const Matrix& matrix);
// Where such a copy goes: `data` with the next such stride, and the bytes it takes.
Matrix aligned_copy(DType dtype, const Matrix& matrix, void* data);
int64_t aligned_copy_bytes(DType dtype, const Matrix& matrix);

// Block rows that one CTA of a kernel works on.
int32_t rows_per_group(ProductKernel kernel, int32_t block_size);

// How often grad_weight cuts the batch so that a few blocks still fill the device.
int32_t batch_splits(int64_t num_places, int32_t block_size, int64_t batch);

std::string name_of(ProductKernel kernel, DType dtype, bool transposed);
std::string name_of(OuterKernel kernel, DType dtype, const char* op);

void check_dtype(const char* op, DType dtype);
// A GPU faults on an element that is not where its type may be.
void check_address(const char* op, const char* name, DType dtype, const void* data);
void check_block_size(const char* op, int32_t block_size);

} // namespace sparsenet::cuda
