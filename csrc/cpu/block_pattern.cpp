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

// One pass of a radix sort by `digits` bits from bit `shift` on; `ends` becomes where each digit's numbers end in `to`.
void sort_by_digit(const int64_t* from, int64_t count, int shift, int digits, int64_t* to, std::vector<int64_t>& ends) {
  const int64_t mask = (int64_t(1) << digits) - 1;
  ends.assign(size_t(mask) + 2, 0);
  for (int64_t i = 0; i < count; ++i) ++ends[size_t((from[i] >> shift) & mask) + 1];
  std::partial_sum(ends.begin(), ends.end(), ends.begin());
  for (int64_t i = 0; i < count; ++i) to[ends[size_t((from[i] >> shift) & mask)]++] = from[i];
}

// Sorts numbers spread evenly over [0, below): by their first bits into pieces that fit the cache, each by its next
// bits, until a few numbers share a place; then by insertion.
void sort_spread(int64_t* numbers, int64_t count, int64_t below) {
  constexpr int kFirst = 11, kMost = 13;
  const int bits = std::bit_width(uint64_t(below) - 1);
  if (count < 1 << kFirst || bits < kFirst) return std::sort(numbers, numbers + count);
  const int next = std::clamp(int(std::bit_width(uint64_t(count))) - kFirst, 0, std::min(kMost, bits - kFirst));
  std::vector<int64_t> pieces(static_cast<size_t>(count)), piece_ends, ends;
  sort_by_digit(numbers, count, bits - kFirst, kFirst, pieces.data(), piece_ends);
  int64_t begin = 0;
  for (size_t piece = 0; piece + 1 < piece_ends.size(); ++piece) {
    sort_by_digit(pieces.data() + begin, piece_ends[piece] - begin, bits - kFirst - next, next, numbers + begin, ends);
    begin = piece_ends[piece];
  }
  for (int64_t i = 1; i < count; ++i) {
    const int64_t number = numbers[i];
    int64_t at = i;
    for (; at > 0 && numbers[at - 1] > number; --at) numbers[at] = numbers[at - 1];
    numbers[at] = number;
  }
}

// splitmix64 (Steele, Lea & Flood, 2014): the stream that begins at `state`.
inline uint64_t random_bits(uint64_t& state) {
  uint64_t x = state += 0x9E3779B97F4A7C15;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

// A number in [0, below), each equally likely (Lemire, 2019): products that would make some likelier are drawn again.
inline int64_t random_below(uint64_t below, uint64_t& state) {
  unsigned __int128 product = (unsigned __int128)(random_bits(state)) * below;
  if (uint64_t(product) < below) {
    const uint64_t uneven = (0 - below) % below;
    while (uint64_t(product) < uneven) product = (unsigned __int128)(random_bits(state)) * below;
  }
  return int64_t(product >> 64);
}

// `count` distinct numbers in [0, below), ascending, uniform over all such sets: numbers are drawn until so many
// differ. Every round draws as many as are missing, so there is never one too many and no choice to make among them.
void draw_distinct(int64_t below, int64_t count, uint64_t key, int64_t* drawn) {
  for (int64_t have = 0; have < count; have = std::unique(drawn, drawn + count) - drawn) {
    for (int64_t i = have; i < count; ++i) drawn[i] = random_below(uint64_t(below), key);
    sort_spread(drawn + have, count - have, below);
    std::inplace_merge(drawn, drawn + have, drawn + count);
  }
}

// Places the blocks of a pattern column by column, in row order within each. Going straight to its place, nearly every
// block of a wide matrix would miss the cache: there they go to strips of columns first.
class Transposition {
public:
  Transposition(const PatternView& pattern, int32_t* t_row, int32_t* t_block)
      : pattern_(pattern), next_(pattern.t_crow, pattern.t_crow + pattern.block_cols()), t_row_(t_row),
        t_block_(t_block) {}

  void run() {
    if (pattern_.block_cols() <= kDirect) {
      for (int64_t i = 0; i < pattern_.num_blocks; ++i) place(pattern_.col[i], pattern_.row[i], int32_t(i));
      return;
    }
    std::vector<int32_t> next;
    for (int64_t c = 0; c < pattern_.block_cols(); c += kStrip) next.push_back(pattern_.t_crow[c]);
    std::vector<uint16_t> col_in_strip(static_cast<size_t>(pattern_.num_blocks));
    for (int64_t i = 0; i < pattern_.num_blocks; ++i) {
      const int32_t at = next[size_t(pattern_.col[i] / kStrip)]++;
      t_row_[at] = pattern_.row[i];
      t_block_[at] = int32_t(i);
      col_in_strip[size_t(at)] = uint16_t(pattern_.col[i] % kStrip);
    }
    std::vector<int32_t> row, block; // of one strip
    int64_t begin = 0;
    for (size_t strip = 0; strip < next.size(); begin = next[strip++]) {
      row.assign(t_row_ + begin, t_row_ + next[strip]);
      block.assign(t_block_ + begin, t_block_ + next[strip]);
      for (size_t i = 0; i < row.size(); ++i)
        place(int64_t(strip) * kStrip + col_in_strip[size_t(begin) + i], row[i], block[i]);
    }
  }

private:
  static constexpr int64_t kStrip = 1024, kDirect = 16 * kStrip;

  void place(int64_t col, int32_t row, int32_t block) {
    const int32_t at = next_[size_t(col)]++;
    t_row_[at] = row;
    t_block_[at] = block;
  }

  PatternView pattern_;
  std::vector<int32_t> next_;
  int32_t *t_row_, *t_block_;
};

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
  for (int64_t r = 0; r < block_rows; ++r) std::fill(row_.begin() + crow[r], row_.begin() + crow[r + 1], int32_t(r));
  view_.crow = crow_.data();
  view_.col = col_.data();
  view_.row = row_.data();
  view_.t_crow = t_crow_.data();
  view_.t_row = t_row_.data();
  view_.t_block = t_block_.data();
  Transposition(view_, t_row_.data(), t_block_.data()).run();
}

void csr_from_places(const int64_t* places, int64_t count, int64_t block_rows, int64_t block_cols, int32_t* crow,
                     int32_t* col) {
  SPARSENET_CHECK(count <= kInt32Max, "BlockPattern: there must be at most 2147483647 blocks, got ", count);
  std::fill_n(crow, block_rows + 1, 0);
  Rows rows{.cols = block_cols};
  for (int64_t i = 0; i < count; ++i) {
    SPARSENET_CHECK(places[i] >= 0 && places[i] < block_rows * block_cols, "BlockPattern: places must lie in [0, ",
                    block_rows * block_cols, "), got ", places[i]);
    ++crow[rows.row_of(places[i]) + 1];
  }
  std::partial_sum(crow, crow + block_rows + 1, crow);
  const int64_t *end = places + count, *second = std::is_sorted_until(places, end);
  if (std::is_sorted(second, end)) { // what stays and what grows: two lists in order, perhaps one of them empty
    const int64_t *a = places, *b = second;
    for (int64_t i = 0; i < count; ++i) col[i] = rows.col_of(b == end || (a != second && *a < *b) ? *a++ : *b++);
  } else {
    std::vector<int32_t> next(crow, crow + block_rows);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = rows.row_of(places[i]);
      col[next[size_t(row)]++] = rows.col_of(places[i]);
    }
    for (int64_t r = 0; r < block_rows; ++r) std::sort(col + crow[r], col + crow[r + 1]);
  }
  for (int64_t r = 0; r < block_rows; ++r) {
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
  if (count <= free / 2) {
    draw_distinct(free, count, key, drawn);
  } else {
    std::vector<int64_t> left(static_cast<size_t>(free - count));
    draw_distinct(free, free - count, key, left.data());
    size_t out = 0;
    for (int64_t rank = 0; rank < free; ++rank)
      if (out < left.size() && left[out] == rank)
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
  int64_t missing = 0;
  for (int64_t i = 0; i < count; ++i) missing += std::isnan(scores[i]);
  if (missing > 0)
    fail("select_extreme: scores must not be NaN, got NaN at ",
         std::find_if(scores, scores + count, [](float score) { return std::isnan(score); }) - scores);
  if (k == 0) return {};
  const Threshold threshold = kth_smallest(scores, count, k, largest);
  std::vector<int64_t> picked(size_t(k) + 1); // without a branch: every index is written, those that stay are counted
  int64_t ties = k - threshold.below, at = 0;
  for (int64_t i = 0; at < k; ++i) {
    const uint32_t key = order_key(scores[i], largest);
    const int64_t tie = key == threshold.key && ties > 0;
    picked[size_t(at)] = i;
    ties -= tie;
    at += (key < threshold.key) | tie;
  }
  picked.pop_back();
  return picked;
}

std::vector<int64_t> lowest_to_spare(const float* scores, int64_t count, int64_t k,
                                     const std::vector<const int64_t*>& lines) {
  SPARSENET_CHECK(k >= 0 && k <= count, "lowest_to_spare: count must lie in [0, ", count, "], got ", k);
  std::vector<std::vector<int64_t>> left(lines.size()); // blocks of each line that have not gone
  for (size_t l = 0; l < lines.size(); ++l) {
    int64_t longest = -1;
    for (int64_t i = 0; i < count; ++i) {
      SPARSENET_CHECK(lines[l][i] >= 0, "lowest_to_spare: lines must not be negative, got ", lines[l][i]);
      longest = std::max(longest, lines[l][i]);
    }
    left[l].assign(size_t(longest + 1), 0);
    for (int64_t i = 0; i < count; ++i) ++left[l][size_t(lines[l][i])];
  }
  std::vector<uint64_t> asked(static_cast<size_t>(count)); // by score, then by number
  for (int64_t i = 0; i < count; ++i) {
    SPARSENET_CHECK(!std::isnan(scores[i]), "lowest_to_spare: scores must not be NaN, got NaN at ", i);
    asked[size_t(i)] = uint64_t(order_key(scores[i], false)) << 32 | uint64_t(i);
  }
  std::vector<int64_t> gone;
  gone.reserve(size_t(k));
  for (int64_t begin = 0; begin < count && int64_t(gone.size()) < k;) {
    // The next lowest, about as many as are missing: what is never asked is never sorted.
    const int64_t missing = k - int64_t(gone.size());
    const int64_t end = std::min(count, begin + missing + missing / 8 + 1024);
    if (end < count) std::nth_element(asked.begin() + begin, asked.begin() + end, asked.end());
    std::sort(asked.begin() + begin, asked.begin() + end);
    for (; begin < end && int64_t(gone.size()) < k; ++begin) {
      const int64_t block = int64_t(asked[size_t(begin)] & 0xffffffffu);
      bool last = false;
      for (size_t l = 0; l < lines.size(); ++l) last |= left[l][size_t(lines[l][block])] == 1;
      if (last) continue;
      for (size_t l = 0; l < lines.size(); ++l) --left[l][size_t(lines[l][block])];
      gone.push_back(block);
    }
  }
  std::sort(gone.begin(), gone.end());
  return gone;
}

} // namespace sparsenet::cpu
