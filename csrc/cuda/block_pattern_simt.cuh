// The kernels of block_pattern: index arrays checked and copied, the transposed index, work lists. A thread per element
// throughout. What is wrong with the input is reported as the smallest (stage, index, code), so that the message does
// not depend on scheduling.
//
//   crow, col -> row[i] = the block row r with crow[r] <= i < crow[r + 1], found by binary search
//   order     -> t_block[j] = order[j], t_row[j] = row[order[j]]: block j of the transposed index, which goes block
//                column by block column; t_crow[c] = how many blocks lie left of block column c
//
// Bytes per block: 36 read (of which 12 are its neighbour's, from cache), 16 written, and the words of the searches.
#pragma once

#include "device/elements.cuh"
#include "device/scan.cuh"
#include "host/ops.h"

namespace sparsenet::cuda {

// The high digit is the stage of checking: an earlier stage's fault is the one that is told.
enum class Fault : int {
  pointer_start = 0x01,
  pointer_end = 0x02,
  pointer_order = 0x03,
  col_range = 0x12,
  col_order = 0x13,
  sort_order = 0x21
};

constexpr unsigned long long kNoFault = ~0ull;
SPARSENET_DEVICE void report(unsigned long long* first_fault, int64_t index, Fault fault) {
  const auto code = static_cast<unsigned long long>(fault);
  atomic_min_global(first_fault, (code >> 4) << 60 | static_cast<unsigned long long>(index) << 8 | code);
}

struct ReadCsr {
  CsrSource source;
  PatternArrays out;
  int64_t block_rows;
  int64_t block_cols;
  unsigned long long* first_fault;
};

static SPARSENET_KERNEL(ElementConfig::kThreads) read_pointers_kernel(const ReadCsr p) {
  const int64_t i = element_index(), num_blocks = p.source.num_blocks;
  if (i > p.block_rows) return;
  const int32_t pointer = load_global(p.source.crow + i);
  store_global(p.out.crow + i, pointer);
  if (i == 0 && pointer != 0) report(p.first_fault, 0, Fault::pointer_start);
  if (i == p.block_rows && pointer != num_blocks) report(p.first_fault, 0, Fault::pointer_end);
  if (i == p.block_rows) return;
  const int32_t next = load_global(p.source.crow + i + 1);
  if (pointer > next || next > num_blocks) report(p.first_fault, i, Fault::pointer_order);
}

// Where the pointers are wrong a block's row is whatever the search ends at; the pattern is then refused.
static SPARSENET_KERNEL(ElementConfig::kThreads) read_columns_kernel(const ReadCsr p) {
  const int64_t i = element_index();
  if (i >= p.source.num_blocks) return;
  int64_t row = lower_bound(p.source.crow, p.block_rows + 1, static_cast<int32_t>(i + 1)) - 1;
  if (row >= p.block_rows) row = p.block_rows - 1;
  if (row < 0) row = 0;
  const int32_t col = load_global(p.source.col + i);
  if (col < 0 || col >= p.block_cols)
    report(p.first_fault, i, Fault::col_range);
  else if (i > 0 && i > load_global(p.source.crow + row) && load_global(p.source.col + i - 1) >= col)
    report(p.first_fault, i, Fault::col_order);
  store_global(p.out.col + i, col);
  store_global(p.out.row + i, static_cast<int32_t>(row));
}

// The block at position j of the transposed index, or -1 where `order` names none.
SPARSENET_DEVICE int64_t sorted_block(const ReadCsr& p, int64_t j) {
  const int64_t block = load_global(p.source.order + j);
  return block >= 0 && block < p.source.num_blocks ? block : -1;
}

// Runs after read_columns: reads the rows it wrote. Neighbours in order, each before the next by (column, number), are
// every block once, sorted stably.
static SPARSENET_KERNEL(ElementConfig::kThreads) transpose_index_kernel(const ReadCsr p) {
  const int64_t j = element_index();
  if (j >= p.source.num_blocks) return;
  const int64_t block = sorted_block(p, j), before = j > 0 ? sorted_block(p, j - 1) : -1;
  bool sorted = block >= 0;
  if (sorted && before >= 0) {
    const int32_t col = load_global(p.source.col + block), col_before = load_global(p.source.col + before);
    sorted = col_before < col || (col_before == col && before < block);
  }
  if (!sorted) report(p.first_fault, j, Fault::sort_order);
  store_global(p.out.t_block + j, static_cast<int32_t>(block));
  store_global(p.out.t_row + j, sorted ? load_global(p.out.row + block) : 0);
}

// t_crow: the first position whose block lies in block column `line` or behind it.
static SPARSENET_KERNEL(ElementConfig::kThreads) transpose_pointers_kernel(const ReadCsr p) {
  const int64_t line = element_index();
  if (line > p.block_cols) return;
  int64_t begin = 0, end = p.source.num_blocks;
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2, block = sorted_block(p, middle);
    if (block >= 0 && load_global(p.source.col + block) < line)
      begin = middle + 1;
    else
      end = middle;
  }
  store_global(p.out.t_crow + line, static_cast<int32_t>(begin));
}

struct MakeWorkList {
  Lines lines;
  WorkShape shape;
  int64_t num_groups;
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
        const int64_t row = group * p.shape.rows_per_group;
        const int64_t end =
            row + p.shape.rows_per_group < p.lines.num_lines ? row + p.shape.rows_per_group : p.lines.num_lines;
        const int64_t blocks = load_global(p.lines.pointers + end) - load_global(p.lines.pointers + row);
        const int64_t length = blocks < p.shape.split_length ? blocks : p.shape.split_length;
        if (length * WorkListConfig::kClasses / (p.shape.split_length + 1) == length_class)
          pieces = static_cast<int32_t>(blocks <= p.shape.split_length ? 1 : ceil_div(blocks, p.shape.split_length));
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
