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

// A place is one number: block row * block_cols + block column. Callers allocate what is written.

// Row pointers [block_rows + 1] and columns [count] of `places` in any order; linear time where they are in order or
// rows are short. Equal places, and those outside the matrix, are refused.
void csr_from_places(const int64_t* places, int64_t count, int64_t block_rows, int64_t block_cols, int32_t* crow,
                     int32_t* col);

// `count` of the `places` that are not in `active` (ascending), uniform over all such sets, ascending; a function of
// the arguments only. Time and memory are those of `active` and `count`, whatever `places` is.
void draw_free_places(const int64_t* active, int64_t num_active, int64_t places, uint64_t key, int64_t count,
                      int64_t* drawn);

// For each block of `to` its number in `from`, or -1: [to.num_blocks]. Both of one matrix and block size.
void carried_blocks(const PatternView& from, const PatternView& to, int64_t* number);

// The places of a pattern's blocks: [num_blocks], ascending.
void linear_places(const PatternView& pattern, int64_t* places);

// A list of places, in any order and perhaps repeated, by block row: what the gradient of candidates walks.
struct PlacesByRow {
  PlacesByRow(const int32_t* rows, const int32_t* cols, int64_t count, int64_t block_rows);
  std::vector<int32_t> crow, col, number; // number: the place's position in the list
};

// Indices of the k smallest (or largest) scores in ascending index order; ties go to the smaller index. NaN is refused.
std::vector<int64_t> select_extreme(const float* scores, int64_t count, int64_t k, bool largest);

// Numbers, ascending, of the k blocks of lowest score that can go, or of fewer: they are asked in the order of their
// scores, ties by number, and one that is then the last of one of its lines stays. lines: [count] each.
std::vector<int64_t> lowest_to_spare(const float* scores, int64_t count, int64_t k,
                                     const std::vector<const int64_t*>& lines);

} // namespace sparsenet::cpu
