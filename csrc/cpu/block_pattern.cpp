// Building an index costs a few passes over it, and is no part of a training step: the transposed index by counting,
// places into row order by counting those of each row, the k best scores by three counting passes.
//
// Measured: 72 ns a block from 1,638 places, 108 from 52,429; 6 ns a score for the best of 16,384; one core of an AMD
// EPYC (Zen 4), calls from Python.
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

// Row and column of places: divides only where the row is not the last one's.
struct Rows {
  int64_t cols;
  int64_t row = 0;
  int64_t row_of(int64_t place) {
    if (place < row * cols || place >= (row + 1) * cols) row = place / cols;
    return row;
  }
  int32_t col_of(int64_t place) { return int32_t(place - row_of(place) * cols); }
};

// Sorts numbers in [0, below): least digit first, each pass stable. `scratch` is taken and left as it happens to be.
void radix_sort(std::vector<int64_t>& numbers, std::vector<int64_t>& scratch, int64_t below) {
  constexpr int kDigit = 11;
  if (numbers.size() < (size_t(1) << kDigit)) return std::sort(numbers.begin(), numbers.end());
  scratch.resize(numbers.size());
  for (int shift = 0; shift < 63 && (below - 1) >> shift != 0; shift += kDigit) {
    const auto digit = [&](int64_t number) { return size_t(number >> shift) & ((size_t(1) << kDigit) - 1); };
    std::vector<size_t> begin((size_t(1) << kDigit) + 1, 0);
    for (const int64_t number : numbers) ++begin[digit(number) + 1];
    std::partial_sum(begin.begin(), begin.end(), begin.begin());
    for (const int64_t number : numbers) scratch[begin[digit(number)]++] = number;
    numbers.swap(scratch);
  }
}

// splitmix64 (Steele, Lea & Flood, 2014), number `counter` of the stream that `key` begins.
inline uint64_t random_bits(uint64_t key, uint64_t counter) {
  uint64_t x = key + (counter + 1) * 0x9E3779B97F4A7C15;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

// `count` distinct numbers in [0, below), ascending, uniform over all such sets: numbers are drawn until so many
// differ. Every round draws as many as are missing, so there is never one too many and no choice to make among them.
std::vector<int64_t> draw_distinct(int64_t below, int64_t count, uint64_t key) {
  std::vector<int64_t> drawn, fresh, scratch;
  uint64_t counter = 0;
  while (int64_t(drawn.size()) < count) {
    const uint64_t excess = (0 - uint64_t(below)) % uint64_t(below); // 2^64 mod below: without these it divides evenly
    fresh.resize(size_t(count) - drawn.size());
    for (int64_t& number : fresh) {
      uint64_t bits = random_bits(key, counter++);
      while (bits < excess) bits = random_bits(key, counter++);
      number = int64_t(bits % uint64_t(below));
    }
    radix_sort(fresh, scratch, below);
    fresh.erase(std::unique(fresh.begin(), fresh.end()), fresh.end());
    scratch.resize(drawn.size() + fresh.size());
    scratch.erase(std::set_union(drawn.begin(), drawn.end(), fresh.begin(), fresh.end(), scratch.begin()),
                  scratch.end());
    drawn.swap(scratch);
  }
  return drawn;
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

void csr_from_places(const int64_t* places, int64_t count, int64_t block_rows, int64_t block_cols, int32_t* crow,
                     int32_t* col) {
  SPARSENET_CHECK(count <= kInt32Max, "BlockPattern: there must be at most 2147483647 blocks, got ", count);
  std::fill_n(crow, block_rows + 1, 0);
  bool ascending = true;
  Rows rows{.cols = block_cols};
  for (int64_t i = 0; i < count; ++i) {
    SPARSENET_CHECK(places[i] >= 0 && places[i] < block_rows * block_cols, "BlockPattern: places must lie in [0, ",
                    block_rows * block_cols, "), got ", places[i]);
    ascending = ascending && (i == 0 || places[i - 1] <= places[i]);
    ++crow[rows.row_of(places[i]) + 1];
  }
  std::partial_sum(crow, crow + block_rows + 1, crow);
  if (ascending) {
    for (int64_t i = 0; i < count; ++i) col[i] = rows.col_of(places[i]);
  } else {
    std::vector<int32_t> next(crow, crow + block_rows);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = rows.row_of(places[i]);
      col[next[size_t(row)]++] = rows.col_of(places[i]);
    }
  }
  for (int64_t r = 0; r < block_rows; ++r) {
    if (!std::is_sorted(col + crow[r], col + crow[r + 1])) std::sort(col + crow[r], col + crow[r + 1]);
    const int32_t* twin = std::adjacent_find(col + crow[r], col + crow[r + 1]);
    SPARSENET_CHECK(twin == col + crow[r + 1], "BlockPattern: places must differ, got (", r, ", ", *twin, ") twice");
  }
}

void draw_free_places(const int64_t* active, int64_t num_active, int64_t places, uint64_t key, int64_t count,
                      int64_t* drawn) {
  const int64_t free = places - num_active;
  for (int64_t i = 0; i < num_active; ++i)
    SPARSENET_CHECK(active[i] >= 0 && active[i] < places && (i == 0 || active[i - 1] < active[i]),
                    "draw_free_places: active must ascend in [0, ", places, "), got ", active[i], " at ", i);
  // First ranks among the free places. Where most of them are taken, those that are left out are drawn.
  const bool few = count <= free / 2;
  const std::vector<int64_t> ranks = draw_distinct(free, few ? count : free - count, key);
  if (few) {
    std::copy(ranks.begin(), ranks.end(), drawn);
  } else {
    size_t out = 0;
    for (int64_t rank = 0; rank < free; ++rank)
      if (out < ranks.size() && ranks[out] == rank)
        ++out;
      else
        drawn[rank - int64_t(out)] = rank;
  }
  int64_t before = 0; // active places before the free one of this rank
  for (int64_t i = 0; i < count; ++i) {
    while (before < num_active && active[before] - before <= drawn[i]) ++before;
    drawn[i] += before;
  }
}

void carried_blocks(const PatternView& from, const PatternView& to, int64_t* number) {
  SPARSENET_CHECK(from.block_rows() == to.block_rows(), "carried_blocks: patterns must have the same block rows, got ",
                  from.block_rows(), " and ", to.block_rows());
  for (int64_t r = 0; r < to.block_rows(); ++r) {
    int32_t old = from.crow[r];
    for (int32_t i = to.crow[r]; i < to.crow[r + 1]; ++i) {
      while (old < from.crow[r + 1] && from.col[old] < to.col[i]) ++old;
      number[i] = old < from.crow[r + 1] && from.col[old] == to.col[i] ? old : -1;
    }
  }
}

void linear_places(const PatternView& pattern, int64_t* places) {
  for (int64_t i = 0; i < pattern.num_blocks; ++i) places[i] = pattern.row[i] * pattern.block_cols() + pattern.col[i];
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
