// What can be said of a pattern's sizes before an index is read: the same words on every device.
#pragma once

#include <cstdint>

#include "block_sizes.h"
#include "check.h"

namespace sparsenet {

inline void check_pattern_sizes(int64_t crow_length, int64_t num_blocks, int64_t rows, int64_t cols,
                                int64_t block_size) {
  constexpr int64_t kInt32Max = 2147483647;
  bool supported = false;
  for (const int64_t allowed : kBlockSizes) supported |= block_size == allowed;
  SPARSENET_CHECK(supported, "BlockPattern: block_size must be one of 1, 4, 8, 16, 32, 64, 128, got ", block_size);
  SPARSENET_CHECK(rows >= 0 && cols >= 0 && rows <= kInt32Max && cols <= kInt32Max,
                  "BlockPattern: shape must have sizes from 0 to 2147483647, got (", rows, ", ", cols, ")");
  const int64_t block_rows = (rows + block_size - 1) / block_size;
  SPARSENET_CHECK(crow_length == block_rows + 1, "BlockPattern: crow_indices must have ", block_rows + 1,
                  " entries (block rows + 1), got ", crow_length);
  SPARSENET_CHECK(num_blocks >= 0 && num_blocks <= kInt32Max,
                  "BlockPattern: there must be at most 2147483647 blocks, got ", num_blocks);
}

} // namespace sparsenet
