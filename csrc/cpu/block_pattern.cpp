#include "block_pattern.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>

#include "../checks.h"

namespace sparsenet::cpu {
namespace {

constexpr int64_t kInt32Max = std::numeric_limits<int32_t>::max();

// Unsigned keys in the order of the scores, or against it: of two keys the smaller is wanted first. -0 equals 0.
inline uint32_t order_key(float score, bool largest) {
  const uint32_t bits = std::bit_cast<uint32_t>(score + 0.0f);
  const uint32_t ascending = bits >> 31 ? ~bits : bits | 0x80000000u;
  return largest ? ~ascending : ascending;
}

struct Threshold {
  uint32_t key;
  int64_t below; // keys smaller than it
};

// The k-th smallest key, k >= 1, found digit by digit: three passes over the scores whatever their order.
Threshold kth_smallest(const float* scores, int64_t count, int64_t k, bool largest) {
  constexpr int kDigit = 11;
  Threshold found = {0, 0};
  uint32_t known = 0; // mask of the digits found so far
  for (int shift : {21, 10, 0}) {
    const uint32_t digit = shift == 0 ? (1u << 10) - 1 : (1u << kDigit) - 1;
    std::vector<int64_t> histogram(size_t(digit) + 1, 0);
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t key = order_key(scores[i], largest);
      if ((key & known) == found.key) ++histogram[(key >> shift) & digit];
    }
    uint32_t d = 0;
    for (; found.below + histogram[d] < k; ++d) found.below += histogram[d];
    found.key |= d << shift;
    known |= digit << shift;
  }
  return found;
}

} // namespace

Pattern::Pattern(const int32_t* crow, int64_t crow_length, const int32_t* col, int64_t num_blocks, int64_t rows,
                 int64_t cols, int64_t block_size) {
  check_pattern_sizes(crow_length, num_blocks, rows, cols, block_size);
  view_.rows = rows;
  view_.cols = cols;
  view_.block_size = int32_t(block_size);
  view_.num_blocks = num_blocks;
  const int64_t block_rows = view_.block_rows(), block_cols = view_.block_cols();
  SPARSENET_CHECK(crow[0] == 0, "BlockPattern: crow_indices must begin with 0, got ", crow[0]);
  SPARSENET_CHECK(crow[block_rows] == num_blocks, "BlockPattern: crow_indices must end with the number of blocks ",
                  num_blocks, ", got ", crow[block_rows]);
  for (int64_t r = 0; r < block_rows; ++r)
    SPARSENET_CHECK(crow[r] <= crow[r + 1] && crow[r + 1] <= num_blocks,
                    "BlockPattern: crow_indices must not decrease, got ", crow[r], " then ", crow[r + 1], " at row ",
                    r);
  for (int64_t r = 0; r < block_rows; ++r)
    for (int64_t i = crow[r]; i < crow[r + 1]; ++i) {
      SPARSENET_CHECK(col[i] >= 0 && col[i] < block_cols, "BlockPattern: col_indices must lie in [0, ", block_cols,
                      "), got ", col[i], " in block row ", r);
      SPARSENET_CHECK(i == crow[r] || col[i - 1] < col[i],
                      "BlockPattern: col_indices must ascend within a block row without duplicates, got ", col[i - 1],
                      " then ", col[i], " in block row ", r);
    }

  crow_.assign(crow, crow + crow_length);
  col_.assign(col, col + num_blocks);
  row_.resize(size_t(num_blocks));
  t_crow_.assign(size_t(block_cols + 1), 0);
  t_row_.resize(size_t(num_blocks));
  t_block_.resize(size_t(num_blocks));
  for (int32_t c : col_) ++t_crow_[size_t(c) + 1];
  std::partial_sum(t_crow_.begin(), t_crow_.end(), t_crow_.begin());
  std::vector<int32_t> next(t_crow_.begin(), t_crow_.end() - 1);
  for (int64_t r = 0; r < block_rows; ++r)
    for (int32_t i = crow_[size_t(r)]; i < crow_[size_t(r) + 1]; ++i) {
      row_[size_t(i)] = int32_t(r);
      const int32_t at = next[size_t(col_[size_t(i)])]++;
      t_row_[size_t(at)] = int32_t(r);
      t_block_[size_t(at)] = i;
    }
  view_.crow = crow_.data();
  view_.col = col_.data();
  view_.row = row_.data();
  view_.t_crow = t_crow_.data();
  view_.t_row = t_row_.data();
  view_.t_block = t_block_.data();
}

std::vector<int32_t> row_order(const int32_t* rows, const int32_t* cols, int64_t count) {
  SPARSENET_CHECK(count <= kInt32Max, "BlockPattern: there must be at most 2147483647 blocks, got ", count);
  std::vector<int32_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  const auto before = [&](int32_t a, int32_t b) { return rows[a] != rows[b] ? rows[a] < rows[b] : cols[a] < cols[b]; };
  if (!std::is_sorted(order.begin(), order.end(), before)) std::sort(order.begin(), order.end(), before);
  for (int64_t i = 1; i < count; ++i) {
    const int32_t a = order[size_t(i) - 1], b = order[size_t(i)];
    SPARSENET_CHECK(rows[a] != rows[b] || cols[a] != cols[b], "BlockPattern: places must differ, got (", rows[a], ", ",
                    cols[a], ") twice");
  }
  return order;
}

PlacesByRow::PlacesByRow(const int32_t* rows, const int32_t* cols, int64_t count, int64_t block_rows)
    : crow(size_t(block_rows + 1), 0), col(static_cast<size_t>(count)), number(static_cast<size_t>(count)) {
  std::iota(number.begin(), number.end(), 0);
  std::stable_sort(number.begin(), number.end(),
                   [&](int32_t a, int32_t b) { return rows[a] != rows[b] ? rows[a] < rows[b] : cols[a] < cols[b]; });
  for (int64_t i = 0; i < count; ++i) {
    ++crow[size_t(rows[i]) + 1];
    col[size_t(i)] = cols[number[size_t(i)]];
  }
  std::partial_sum(crow.begin(), crow.end(), crow.begin());
}

std::vector<int64_t> select_extreme(const float* scores, int64_t count, int64_t k, bool largest) {
  SPARSENET_CHECK(k >= 0 && k <= count, "select_extreme: k must lie in [0, ", count, "], got ", k);
  for (int64_t i = 0; i < count; ++i)
    SPARSENET_CHECK(!std::isnan(scores[i]), "select_extreme: scores must not be NaN, got NaN at ", i);
  std::vector<int64_t> picked(static_cast<size_t>(k));
  if (k == 0) return picked;
  const Threshold threshold = kth_smallest(scores, count, k, largest);
  int64_t ties = k - threshold.below, at = 0;
  for (int64_t i = 0; at < k; ++i) {
    const uint32_t key = order_key(scores[i], largest);
    if (key < threshold.key || (key == threshold.key && ties-- > 0)) picked[size_t(at++)] = i;
  }
  return picked;
}

} // namespace sparsenet::cpu
