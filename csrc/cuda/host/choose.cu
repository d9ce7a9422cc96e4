#include "choose.h"

#include <algorithm>
#include <atomic>

#include "launch.h"

namespace sparsenet::cuda {

namespace {

std::atomic<Variant> forced{Variant::automatic};

constexpr int64_t kSmallBatch = 32;   // up to here forward streams the weights as the M side of the instruction
constexpr int64_t kSplitRows = 256;   // the least batch rows that are worth a split of their own
constexpr int32_t kTileColumns = 128; // output columns of an sm_80 CTA
constexpr int64_t kTileRows = 128;    // batch rows of an sm_80 CTA
constexpr int64_t kMostTiles = 256;
constexpr int64_t kLongestOverMean = 4; // groups longer than this many times the mean are cut
constexpr int64_t kLeastColumns = 512;  // columns of blocks that are worth a piece of their own

// Asynchronous copies move 16 bytes: rows must start on a 16-byte boundary.
bool rows_aligned(const Matrix& matrix, DType dtype) {
  return reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0 && matrix.stride * element_bytes(dtype) % 16 == 0;
}

bool tensor_cores_serve(DType dtype, int32_t block_size) {
  return device_properties().arch >= 80 && dtype != DType::float32 && dtype != DType::float64 && block_size >= 16;
}

void refuse_forced(const char* op) {
  fail(op, ": variant must be able to serve this call, got sm80 (it needs compute capability 8.0, bfloat16, float16 or "
           "tf32, blocks of 16 or more, and rows that start on 16-byte boundaries)");
}

} // namespace

void force_variant(Variant variant) {
  SPARSENET_CHECK(variant >= Variant::automatic && variant <= Variant::sm80,
                  "force_variant: variant must be automatic, simt or sm80, got ", static_cast<int32_t>(variant));
  forced = variant;
}

ProductKernel choose_product(DType dtype, int32_t block_size, int64_t batch, const Matrix& a, const void* values,
                             bool transposed) {
  const bool sm80 = forced != Variant::simt && tensor_cores_serve(dtype, block_size) && rows_aligned(a, dtype) &&
                    reinterpret_cast<uintptr_t>(values) % 16 == 0;
  if (forced == Variant::sm80 && !sm80) refuse_forced("block_sparse_linear");
  if (!sm80) return block_size < 16 ? ProductKernel::rows_simt : ProductKernel::simt;
  return batch <= kSmallBatch && !transposed ? ProductKernel::small_batch_sm80 : ProductKernel::sm80;
}

GradWeightKernel choose_grad_weight(DType dtype, int32_t block_size, const Matrix& grad_z, const Matrix& x) {
  const bool sm80 = forced != Variant::simt && tensor_cores_serve(dtype, block_size) && rows_aligned(grad_z, dtype) &&
                    rows_aligned(x, dtype);
  if (forced == Variant::sm80 && !sm80) refuse_forced("block_gradient");
  if (sm80) return GradWeightKernel::sm80;
  return block_size < 16 ? GradWeightKernel::small_simt : GradWeightKernel::simt;
}

Operand aligned_copy(DType dtype, const Matrix& matrix) {
  const int64_t stride = round_up(matrix.cols, 16 / element_bytes(dtype));
  return {.given = matrix,
          .read = {nullptr, matrix.rows, matrix.cols, stride},
          .copy_bytes = round_up(matrix.rows * stride * element_bytes(dtype), 256)};
}

Operand operand(DType dtype, int32_t block_size, const Matrix& matrix) {
  const bool worth_it =
      forced != Variant::simt && tensor_cores_serve(dtype, block_size) && !rows_aligned(matrix, dtype);
  if (worth_it) return aligned_copy(dtype, matrix);
  return {.given = matrix, .read = matrix, .copy_bytes = 0};
}

int32_t rows_per_group(ProductKernel kernel, int32_t block_size) {
  return kernel == ProductKernel::sm80 ? kTileColumns / block_size : 1;
}

int32_t preferred_rows_per_group(DType dtype, int32_t block_size) {
  check_dtype("preferred_rows_per_group", dtype);
  check_block_size("preferred_rows_per_group", block_size);
  const bool sm80 = forced != Variant::simt && tensor_cores_serve(dtype, block_size);
  return rows_per_group(sm80 ? ProductKernel::sm80 : ProductKernel::simt, block_size);
}

WorkShape preferred_work(const PatternView& pattern, DType dtype, int64_t batch, bool transposed) {
  const int32_t group = preferred_rows_per_group(dtype, pattern.block_size);
  const int64_t groups = ceil_div(transposed ? pattern.block_cols() : pattern.block_rows(), group);
  if (groups == 0 || pattern.block_size < 16) return {group, 0};
  // Rows several times longer than the mean would finish alone; with a small batch there are not enough CTAs at all.
  const int64_t longest = kLongestOverMean * ceil_div(pattern.num_blocks, groups);
  int64_t tiles = 1;
  while (tiles * kTileRows < batch && tiles < kMostTiles) tiles *= 2; // powers of two: few lists a pattern
  const int64_t filling = ceil_div(pattern.num_blocks * tiles, 2 * device_properties().num_multiprocessors);
  const int64_t least = std::max<int64_t>(8, kLeastColumns / pattern.block_size);
  return {group, std::max(least, std::min(longest, filling))};
}

int32_t batch_splits(int64_t num_places, int32_t block_size, int64_t batch) {
  const int64_t tiles = std::max<int64_t>(1, num_places * ceil_div(block_size, 64) * ceil_div(block_size, 64));
  const int64_t wanted = ceil_div(2 * device_properties().num_multiprocessors, tiles);
  return static_cast<int32_t>(std::max<int64_t>(1, std::min(wanted, batch / kSplitRows)));
}

int64_t split_bytes(int32_t splits, int64_t num_places, int32_t block_size, DType dtype) {
  if (splits == 1) return 0;
  return splits * num_places * block_size * block_size * (dtype == DType::float64 ? 8 : 4);
}

std::string name_of(ProductKernel kernel, DType dtype, bool transposed) {
  const std::string pass = transposed ? "grad_input" : "forward";
  const std::string type = dtype == kTf32 ? "_tf32" : "";
  switch (kernel) {
  case ProductKernel::simt:
    return pass + "_simt";
  case ProductKernel::rows_simt:
    return pass + "_rows_simt";
  case ProductKernel::sm80:
    return pass + type + "_sm80";
  default:
    return pass + "_small" + type + "_sm80";
  }
}

std::string name_of(GradWeightKernel kernel, DType dtype) {
  switch (kernel) {
  case GradWeightKernel::simt:
    return "grad_weight_simt";
  case GradWeightKernel::small_simt:
    return "grad_weight_small_simt";
  default:
    return dtype == kTf32 ? "grad_weight_tf32_sm80" : "grad_weight_sm80";
  }
}

} // namespace sparsenet::cuda
