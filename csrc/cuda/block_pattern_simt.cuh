// The kernels of block_pattern: keys for the sort, index arrays from sorted keys, places without a block, gathers,
// work lists. A place (row, col) has the key row * block_cols + col (64 bits). A thread per element throughout; what
// is wrong with the input is reported as the smallest (index, code), so the message does not depend on scheduling.
//
// Bytes moved: a few index words per block; gather_blocks reads and writes every surviving value once.
// Nothing here has been timed on hardware yet.
#pragma once

#include "device/elements.cuh"
#include "radix_sort.cuh"

namespace sparsenet::cuda {

// The high digit is the stage of checking: an earlier stage's fault is the one that is told.
enum class Fault : int {
  pointer_start = 0x01,
  pointer_end = 0x02,
  pointer_order = 0x03,
  dropped_range = 0x04,
  not_a_number = 0x05,
  row_range = 0x11,
  col_range = 0x12,
  col_order = 0x13,
  duplicate = 0x21,
  dropped_twice = 0x22
};

constexpr unsigned long long kNoFault = ~0ull;
SPARSENET_DEVICE void report(unsigned long long* first_fault, int64_t index, Fault fault) {
  const auto code = static_cast<unsigned long long>(fault);
  atomic_min_global(first_fault, (code >> 4) << 60 | static_cast<unsigned long long>(index) << 8 | code);
}

struct PatternKeys {
  const int32_t* rows;
  const int32_t* cols;
  const int32_t* dropped; // update: flags [num_old], else null
  const int32_t* grown_rows;
  const int32_t* grown_cols;
  int64_t num_old; // elements from rows/cols; the rest are grown places
  int64_t count;
  int64_t block_rows;
  int64_t block_cols;
  uint64_t dropped_key; // sorts behind every place
  uint64_t* keys;
  int32_t* payload;
  unsigned long long* first_fault;
};

static SPARSENET_KERNEL(ElementConfig::kThreads) make_keys_kernel(const PatternKeys p) {
  const int64_t i = element_index();
  if (i >= p.count) return;
  const bool grown = i >= p.num_old;
  const int64_t row = grown ? load_global(p.grown_rows + i - p.num_old) : load_global(p.rows + i);
  const int64_t col = grown ? load_global(p.grown_cols + i - p.num_old) : load_global(p.cols + i);
  if (row < 0 || row >= p.block_rows)
    report(p.first_fault, i, Fault::row_range);
  else if (col < 0 || col >= p.block_cols)
    report(p.first_fault, i, Fault::col_range);
  const bool leaves = !grown && p.dropped != nullptr && load_global(p.dropped + i) != 0;
  store_global(p.keys + i, leaves ? p.dropped_key : static_cast<uint64_t>(row * p.block_cols + col));
  store_global(p.payload + i, static_cast<int32_t>(grown ? p.num_old - 1 - i : i));
}

// Row pointers and columns as they were handed over: checked, copied, and keyed for the transposed index. Where the
// pointers are wrong a block's row is whatever the search ends at; the pattern is then refused.
struct ReadCsr {
  const int32_t* crow;
  const int32_t* col;
  PatternArrays out;
  uint64_t* t_keys;
  int32_t* t_payload;
  unsigned long long* first_fault;
};

static SPARSENET_KERNEL(ElementConfig::kThreads) read_pointers_kernel(const ReadCsr p) {
  const int64_t i = element_index();
  if (i > p.out.block_rows) return;
  const int32_t pointer = load_global(p.crow + i);
  store_global(p.out.crow + i, pointer);
  if (i == 0 && pointer != 0) report(p.first_fault, 0, Fault::pointer_start);
  if (i == p.out.block_rows && pointer != p.out.num_blocks) report(p.first_fault, 0, Fault::pointer_end);
  if (i == p.out.block_rows) return;
  const int32_t next = load_global(p.crow + i + 1);
  if (pointer > next || next > p.out.num_blocks) report(p.first_fault, i, Fault::pointer_order);
}

static SPARSENET_KERNEL(ElementConfig::kThreads) read_columns_kernel(const ReadCsr p) {
  const int64_t i = element_index();
  if (i >= p.out.num_blocks) return;
  int64_t row = lower_bound(p.crow, p.out.block_rows + 1, static_cast<int32_t>(i + 1)) - 1;
  if (row >= p.out.block_rows) row = p.out.block_rows - 1;
  if (row < 0) row = 0;
  const int32_t col = load_global(p.col + i);
  if (col < 0 || col >= p.out.block_cols)
    report(p.first_fault, i, Fault::col_range);
  else if (i > 0 && i > load_global(p.crow + row) && load_global(p.col + i - 1) >= col)
    report(p.first_fault, i, Fault::col_order);
  store_global(p.out.col + i, col);
  store_global(p.out.row + i, static_cast<int32_t>(row));
  store_global(p.t_keys + i, static_cast<uint64_t>(col * p.out.block_rows + row));
  store_global(p.t_payload + i, static_cast<int32_t>(i));
}

struct MarkDropped {
  const int32_t* dropped;
  int32_t* flags;
  int64_t count;
  int64_t num_blocks;
  unsigned long long* first_fault;
};

static SPARSENET_KERNEL(ElementConfig::kThreads) mark_dropped_kernel(const MarkDropped p) {
  const int64_t i = element_index();
  if (i >= p.count) return;
  const int32_t block = load_global(p.dropped + i);
  if (block < 0 || block >= p.num_blocks)
    report(p.first_fault, i, Fault::dropped_range);
  else
    store_global(p.flags + block, 1);
}

// From sorted place keys: col, row, order; keys of the transposed places for the second sort.
struct UnpackPlaces {
  const uint64_t* keys;
  const int32_t* payload;
  PatternArrays out;
  int32_t* order; // or null
  uint64_t* t_keys;
  int32_t* t_payload;
  uint64_t num_places; // keys from here on are no places
  int64_t count;       // keys, those of dropped blocks included
  unsigned long long* first_fault;
};

static SPARSENET_KERNEL(ElementConfig::kThreads) unpack_places_kernel(const UnpackPlaces p) {
  const int64_t i = element_index();
  if (i == p.out.num_blocks && i < p.count && load_global(p.keys + i) < p.num_places)
    report(p.first_fault, i, Fault::dropped_twice); // more blocks stayed than were meant to
  if (i >= p.out.num_blocks) return;
  const uint64_t key = load_global(p.keys + i);
  if (key >= p.num_places || (i > 0 && load_global(p.keys + i - 1) == key)) report(p.first_fault, i, Fault::duplicate);
  const uint64_t row = key / p.out.block_cols, col = key % p.out.block_cols;
  store_global(p.out.row + i, static_cast<int32_t>(row));
  store_global(p.out.col + i, static_cast<int32_t>(col));
  if (p.order != nullptr) store_global(p.order + i, load_global(p.payload + i));
  store_global(p.t_keys + i, col * p.out.block_rows + row);
  store_global(p.t_payload + i, static_cast<int32_t>(i));
}

// Pointers of an index from its sorted keys: pointers[line] = number of keys below line * width.
struct MakePointers {
  const uint64_t* keys;
  int64_t count;
  int64_t lines;
  int64_t width;
  int32_t* pointers;
};

static SPARSENET_KERNEL(ElementConfig::kThreads) make_pointers_kernel(const MakePointers p) {
  const int64_t line = element_index();
  if (line > p.lines) return;
  store_global(p.pointers + line,
               static_cast<int32_t>(lower_bound(p.keys, p.count, static_cast<uint64_t>(line * p.width))));
}

struct UnpackTransposed {
  const uint64_t* keys;
  const int32_t* payload;
  PatternArrays out;
};

static SPARSENET_KERNEL(ElementConfig::kThreads) unpack_transposed_kernel(const UnpackTransposed p) {
  const int64_t i = element_index();
  if (i >= p.out.num_blocks) return;
  const int64_t rows = p.out.block_rows > 0 ? p.out.block_rows : 1; // none: the pattern will be refused
  store_global(p.out.t_row + i, static_cast<int32_t>(load_global(p.keys + i) % rows));
  store_global(p.out.t_block + i, load_global(p.payload + i));
}

struct ScoreKeys {
  const float* scores;
  int64_t count;
  bool highest;
  uint64_t* keys;
  int32_t* payload;
  unsigned long long* first_fault;
};

static SPARSENET_KERNEL(ElementConfig::kThreads) score_keys_kernel(const ScoreKeys p) {
  const int64_t i = element_index();
  if (i >= p.count) return;
  const uint32_t bits = bits_of(load_global(p.scores + i) + 0.0f); // -0 and +0 are the same score
  if ((bits & 0x7fffffffu) > 0x7f800000u) report(p.first_fault, i, Fault::not_a_number);
  const uint32_t ascending = bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
  store_global(p.keys + i, static_cast<uint64_t>(p.highest ? ~ascending : ascending));
  store_global(p.payload + i, static_cast<int32_t>(i));
}

struct CopyIndices {
  const int32_t* source;
  int32_t* target;
  int64_t count;
};

static SPARSENET_KERNEL(ElementConfig::kThreads) copy_indices_kernel(const CopyIndices p) {
  const int64_t i = element_index();
  if (i < p.count) store_global(p.target + i, load_global(p.source + i));
}

struct InactivePlaces {
  const int32_t* crow;
  const int32_t* col;
  int64_t block_rows;
  int64_t block_cols;
  int32_t* place_rows;
  int32_t* place_cols;
};

static SPARSENET_KERNEL(ElementConfig::kThreads) inactive_places_kernel(const InactivePlaces p) {
  const int64_t place = element_index();
  if (place >= p.block_rows * p.block_cols) return;
  const int64_t row = place / p.block_cols;
  const auto col = static_cast<int32_t>(place % p.block_cols);
  const int32_t begin = load_global(p.crow + row), end = load_global(p.crow + row + 1);
  const int64_t position = begin + lower_bound(p.col + begin, end - begin, col);
  if (position < end && load_global(p.col + position) == col) return;
  const int64_t target = place - position; // as many active places lie before this one
  store_global(p.place_rows + target, static_cast<int32_t>(row));
  store_global(p.place_cols + target, col);
}

struct GatherBlocks {
  const void* in;
  const int32_t* source;
  void* out;
  int64_t num_blocks;
  int64_t words_per_block;
};

template <typename Word>
SPARSENET_KERNEL(ElementConfig::kThreads)
gather_blocks_kernel(const GatherBlocks p) {
  const int64_t i = element_index();
  if (i >= p.num_blocks * p.words_per_block) return;
  const int64_t source = load_global(p.source + i / p.words_per_block);
  Word word{};
  if (source >= 0)
    word = load_global(static_cast<const Word*>(p.in) + source * p.words_per_block + i % p.words_per_block);
  store_global(static_cast<Word*>(p.out) + i, word);
}

struct MakeWorkList {
  const int32_t* crow;
  int64_t num_rows;
  int64_t num_groups;
  int32_t rows_per_group;
  int64_t split_length;
  WorkItem* items;
  int32_t* counts; // items, slots
};

// One CTA. Groups go by 16 classes of length, longest class first, in row order within a class: a stable result
// without sorting, and long enough classes that the last CTAs to run are short ones.
struct WorkListConfig {
  static constexpr int kClasses = 16;
};

static SPARSENET_KERNEL(ScanConfig::kThreads) work_list_kernel(const MakeWorkList p) {
  const Shared<int32_t> scratch = shared_array<int32_t>(0);
  int32_t num_items = 0, num_slots = 0;
  for (int length_class = WorkListConfig::kClasses - 1; length_class >= 0; --length_class) {
    for (int64_t first = 0; first < p.num_groups; first += ScanConfig::kThreads) {
      const int64_t group = first + thread_index();
      int32_t pieces = 0;
      if (group < p.num_groups) {
        const int64_t row = group * p.rows_per_group;
        const int64_t end = row + p.rows_per_group < p.num_rows ? row + p.rows_per_group : p.num_rows;
        const int64_t blocks = load_global(p.crow + end) - load_global(p.crow + row);
        const int64_t length = blocks < p.split_length ? blocks : p.split_length;
        if (length * WorkListConfig::kClasses / (p.split_length + 1) == length_class)
          pieces = static_cast<int32_t>(blocks <= p.split_length ? 1 : ceil_div(blocks, p.split_length));
      }
      int32_t total_items = 0, total_slots = 0;
      const int32_t item = num_items + block_exclusive_scan<ScanConfig::kWarps>(pieces, scratch, total_items);
      const int32_t slot =
          num_slots + block_exclusive_scan<ScanConfig::kWarps>(pieces > 1 ? pieces : 0, scratch, total_slots);
      for (int32_t piece = 0; piece < pieces; ++piece)
        store_global(p.items + item + piece,
                     WorkItem{static_cast<int32_t>(group), piece, pieces, pieces > 1 ? slot : -1});
      num_items += total_items;
      num_slots += total_slots;
    }
  }
  if (thread_index() == 0) {
    store_global(p.counts, num_items);
    store_global(p.counts + 1, num_slots);
  }
}

} // namespace sparsenet::cuda
