// block_pattern on the CPU: indices are checked once, here, and kernels then read only this object's own copy of them.
#pragma once

#include <cstdint>
#include <vector>

#include "../types.h"

namespace sparsenet::cpu {

// A pattern that passed every check, with its transposed index. Immutable.
class Pattern {
public:
  // crow [block rows + 1], col [num_blocks], columns ascending within a row. Throws std::invalid_argument.
  Pattern(const int32_t* crow, int64_t crow_length, const int32_t* col, int64_t num_blocks, int64_t rows, int64_t cols,
          int64_t block_size);
  const PatternView& view() const { return view_; }

private:
  std::vector<int32_t> crow_, col_, row_, t_crow_, t_row_, t_block_;
  PatternView view_;
};

// Sorts places (block row, block column) into row order: order[i] is the place that comes i-th. Equal places are
// refused.
std::vector<int32_t> row_order(const int32_t* rows, const int32_t* cols, int64_t count);

// A list of places, in any order and perhaps repeated, by block row: what the gradient of candidates walks.
struct PlacesByRow {
  PlacesByRow(const int32_t* rows, const int32_t* cols, int64_t count, int64_t block_rows);
  std::vector<int32_t> crow, col, number; // number: the place's position in the list
};

// Indices of the k smallest (or largest) scores in ascending index order; ties go to the smaller index. NaN is refused.
std::vector<int64_t> select_extreme(const float* scores, int64_t count, int64_t k, bool largest);

} // namespace sparsenet::cpu
