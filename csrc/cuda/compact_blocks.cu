// compact_blocks on CUDA: checks and launches. Rows and columns were checked by the caller (sparsenet.functional).
#include <algorithm>

#include "compact_blocks_simt.cuh"

namespace sparsenet::cuda {

namespace {

int32_t log2_of(int32_t power) {
  int32_t shift = 0;
  while (1 << shift < power) ++shift;
  return shift;
}

} // namespace

void compact_blocks(const CompactBlocks& op, const Run& run) {
  check_compact_blocks(op);
  for (int64_t first = 0; first < op.num_tensors; first += CompactConfig::kMostTensors) {
    const int64_t count = std::min<int64_t>(op.num_tensors - first, CompactConfig::kMostTensors);
    CompactParams params{.from_crow = op.from.crow,
                         .from_col = op.from.col,
                         .to_row = op.to.row,
                         .to_col = op.to.col,
                         .rows = op.rows,
                         .cols = op.cols,
                         .to_rows = op.to.rows,
                         .to_cols = op.to.cols,
                         .num_blocks = op.to.num_blocks,
                         .block_shift = log2_of(op.to.block_size),
                         .num_tensors = static_cast<int32_t>(count),
                         .tensors = {}};
    std::copy_n(op.tensors + first, count, params.tensors);
    launch_elements("compact_blocks", compact_blocks_kernel, op.to.num_blocks << 2 * params.block_shift, run.stream,
                    params);
  }
}

} // namespace sparsenet::cuda
