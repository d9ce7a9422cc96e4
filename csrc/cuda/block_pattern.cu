// block_pattern on CUDA: canonical index arrays, drop and grow, gathers and work lists, all on the device. Weights
// never leave it; the host waits only to learn whether the input was right, and how long a work list became.
#include <algorithm>

#include "../pattern_sizes.h"
#include "block_pattern_simt.cuh"

namespace sparsenet::cuda {

namespace {

constexpr const char* kOp = "BlockPattern"; // as on the CPU: the same input, the same message

// Takes aligned pieces off a workspace; with null memory it only measures.
class Carver {
public:
  explicit Carver(void* data) : data_(static_cast<char*>(data)) {}
  template <typename T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(data_ + bytes_);
    bytes_ += round_up(std::max<int64_t>(count, 1) * static_cast<int64_t>(sizeof(T)), 256);
    return piece;
  }
  int64_t bytes() const { return bytes_; }

private:
  char* data_;
  int64_t bytes_ = 0;
};

struct Scratch {
  unsigned long long* first_fault;
  int32_t* counts; // of a work list
  int32_t* flags;
  SortBuffers sort;
  int64_t bytes;
};

Scratch carve(void* data, int64_t count) {
  Carver carver(data);
  Scratch scratch{};
  scratch.first_fault = carver.take<unsigned long long>(1);
  scratch.counts = carver.take<int32_t>(2);
  scratch.flags = carver.take<int32_t>(count);
  scratch.sort = {carver.take<uint64_t>(count),
                  carver.take<int32_t>(count),
                  carver.take<uint64_t>(count),
                  carver.take<int32_t>(count),
                  carver.take<int32_t>(radix_counts_size(count)),
                  count};
  scratch.bytes = carver.bytes();
  return scratch;
}

Scratch checked_scratch(const Workspace& workspace, int64_t count, Stream stream) {
  Scratch scratch = carve(workspace.data, count);
  SPARSENET_CHECK(workspace.bytes >= scratch.bytes && workspace.data != nullptr, kOp, ": workspace must have at least ",
                  scratch.bytes, " bytes, got ", workspace.bytes);
  fill_bytes(scratch.first_fault, 0xff, sizeof(kNoFault), stream);
  return scratch;
}

struct Finding {
  Fault fault = Fault::row_range;
  int64_t index = -1; // -1: nothing wrong
};

Finding fetch_fault(const Scratch& scratch, Stream stream) {
  unsigned long long packed = kNoFault;
  copy_to_host(&packed, scratch.first_fault, sizeof(packed), stream);
  if (packed == kNoFault) return {};
  return {static_cast<Fault>(packed & 0xff), static_cast<int64_t>((packed & ~(0xfull << 60)) >> 8)};
}

int32_t fetch(const int32_t* array, int64_t index, Stream stream) {
  int32_t value = 0;
  copy_to_host(&value, array + index, sizeof(value), stream);
  return value;
}

int bits_for(uint64_t values) {
  int bits = 1;
  while (bits < 63 && (1ull << bits) < values) ++bits;
  return bits;
}

void check_arrays(const PatternArrays& out) {
  SPARSENET_CHECK(
      out.block_rows >= 0 && out.block_cols >= 0 && out.block_rows <= 2147483647 && out.block_cols <= 2147483647, kOp,
      ": block rows and columns must lie in [0, 2147483647], got [", out.block_rows, ", ", out.block_cols, "]");
  SPARSENET_CHECK(out.num_blocks >= 0 && out.num_blocks <= 2147483647 &&
                      out.num_blocks <= out.block_rows * out.block_cols,
                  kOp, ": num_blocks must lie in [0, ", std::min<int64_t>(2147483647, out.block_rows * out.block_cols),
                  "], got ", out.num_blocks);
}

int place_bits(const PatternArrays& out) {
  return bits_for(static_cast<uint64_t>(out.block_rows) * static_cast<uint64_t>(out.block_cols));
}

// The transposed index, from keys and block numbers in the sort's other buffers.
void write_transposed(const Scratch& scratch, const PatternArrays& out, Stream stream) {
  SortBuffers transposed = scratch.sort;
  std::swap(transposed.keys, transposed.other_keys);
  std::swap(transposed.payload, transposed.other_payload);
  transposed.count = out.num_blocks;
  radix_sort(transposed, place_bits(out), stream);
  launch_elements("make_pointers", make_pointers_kernel, out.block_cols + 1, stream,
                  MakePointers{transposed.keys, out.num_blocks, out.block_cols, out.block_rows, out.t_crow});
  launch_elements("unpack_transposed", unpack_transposed_kernel, out.num_blocks, stream,
                  UnpackTransposed{transposed.keys, transposed.payload, out});
}

// Sorted place keys are in scratch.sort: writes every index array.
void write_arrays(const Scratch& scratch, const PatternArrays& out, int32_t* order, Stream stream) {
  const auto num_places = static_cast<uint64_t>(out.block_rows * out.block_cols);
  launch_elements("make_pointers", make_pointers_kernel, out.block_rows + 1, stream,
                  MakePointers{scratch.sort.keys, out.num_blocks, out.block_rows, out.block_cols, out.crow});
  launch_elements("unpack_places", unpack_places_kernel, out.num_blocks + 1, stream,
                  UnpackPlaces{scratch.sort.keys, scratch.sort.payload, out, order, scratch.sort.other_keys,
                               scratch.sort.other_payload, num_places, scratch.sort.count, scratch.first_fault});
  write_transposed(scratch, out, stream);
}

PatternKeys keys_of(const PatternArrays& out, const Scratch& scratch) {
  PatternKeys keys{};
  keys.num_old = out.num_blocks;
  keys.count = out.num_blocks;
  keys.block_rows = out.block_rows;
  keys.block_cols = out.block_cols;
  keys.keys = scratch.sort.keys;
  keys.payload = scratch.sort.payload;
  keys.first_fault = scratch.first_fault;
  return keys;
}

void refuse_place(const Finding& finding, const PatternKeys& keys, Stream stream) {
  const bool row = finding.fault == Fault::row_range;
  const bool grown = finding.index >= keys.num_old;
  const int32_t* array = row ? (grown ? keys.grown_rows : keys.rows) : (grown ? keys.grown_cols : keys.cols);
  const int64_t index = grown ? finding.index - keys.num_old : finding.index;
  fail(kOp, ": ", grown ? "grown " : "", row ? "rows" : "cols", " must lie in [0, ",
       row ? keys.block_rows : keys.block_cols, "), got ", fetch(array, index, stream), " at ", index);
}

// Sorts, writes, and then says what was wrong with the places, if anything.
void finish_pattern(Scratch& scratch, const PatternKeys& keys, const int32_t* dropped, const PatternArrays& out,
                    int32_t* order, Stream stream) {
  launch_elements("make_keys", make_keys_kernel, keys.count, stream, keys);
  radix_sort(scratch.sort, bits_for(std::max<uint64_t>(keys.dropped_key + 1, out.block_rows * out.block_cols)), stream);
  write_arrays(scratch, out, order, stream);
  const Finding finding = fetch_fault(scratch, stream);
  if (finding.index < 0) return;
  switch (finding.fault) {
  case Fault::dropped_range:
    fail("update_pattern: dropped must lie in [0, ", keys.num_old, "), got ", fetch(dropped, finding.index, stream),
         " at ", finding.index);
  case Fault::dropped_twice:
    fail("update_pattern: dropped must list each block once, got a repeated block number");
  case Fault::duplicate:
    fail(kOp, ": places must differ, got (", fetch(out.row, finding.index, stream), ", ",
         fetch(out.col, finding.index, stream), ") twice");
  default:
    refuse_place(finding, keys, stream);
  }
}

void refuse_csr(const Finding& finding, const CsrSource& source, const PatternArrays& out, Stream stream) {
  const int64_t i = finding.index;
  switch (finding.fault) {
  case Fault::pointer_start:
    fail(kOp, ": crow_indices must begin with 0, got ", fetch(source.crow, 0, stream));
  case Fault::pointer_end:
    fail(kOp, ": crow_indices must end with the number of blocks ", out.num_blocks, ", got ",
         fetch(source.crow, out.block_rows, stream));
  case Fault::pointer_order:
    fail(kOp, ": crow_indices must not decrease, got ", fetch(source.crow, i, stream), " then ",
         fetch(source.crow, i + 1, stream), " at row ", i);
  case Fault::col_range:
    fail(kOp, ": col_indices must lie in [0, ", out.block_cols, "), got ", fetch(source.col, i, stream),
         " in block row ", fetch(out.row, i, stream));
  default:
    fail(kOp, ": col_indices must ascend within a block row without duplicates, got ", fetch(source.col, i - 1, stream),
         " then ", fetch(source.col, i, stream), " in block row ", fetch(out.row, i, stream));
  }
}

} // namespace

int64_t pattern_workspace_bytes(int64_t count, int64_t block_rows, int64_t block_cols) {
  SPARSENET_CHECK(count >= 0 && count <= 2147483647, kOp, ": count must lie in [0, 2147483647], got ", count);
  SPARSENET_CHECK(block_rows >= 0 && block_cols >= 0, kOp, ": block rows and columns must not be negative, got [",
                  block_rows, ", ", block_cols, "]");
  return carve(nullptr, count).bytes;
}

void pattern_from_places(const int32_t* place_rows, const int32_t* place_cols, const PatternArrays& out, int32_t* order,
                         Workspace workspace, Stream stream) {
  check_arrays(out);
  Scratch scratch = checked_scratch(workspace, out.num_blocks, stream);
  PatternKeys keys = keys_of(out, scratch);
  keys.rows = place_rows;
  keys.cols = place_cols;
  finish_pattern(scratch, keys, nullptr, out, order, stream);
}

void pattern_from_csr(const CsrSource& source, const PatternArrays& out, Workspace workspace, Stream stream) {
  check_pattern_sizes(source.crow_length, out.num_blocks, source.rows, source.cols, source.block_size);
  SPARSENET_CHECK(out.block_rows == ceil_div(source.rows, source.block_size) &&
                      out.block_cols == ceil_div(source.cols, source.block_size),
                  kOp, ": block rows and columns must be ", ceil_div(source.rows, source.block_size), " and ",
                  ceil_div(source.cols, source.block_size), ", got ", out.block_rows, " and ", out.block_cols);
  const Scratch scratch = checked_scratch(workspace, out.num_blocks, stream);
  const ReadCsr csr{source.crow,        source.col, out, scratch.sort.other_keys, scratch.sort.other_payload,
                    scratch.first_fault};
  launch_elements("read_pointers", read_pointers_kernel, out.block_rows + 1, stream, csr);
  launch_elements("read_columns", read_columns_kernel, out.num_blocks, stream, csr);
  write_transposed(scratch, out, stream);
  const Finding finding = fetch_fault(scratch, stream);
  if (finding.index >= 0) refuse_csr(finding, source, out, stream);
}

void select_scores(const float* scores, int64_t count, int64_t k, bool highest, int32_t* selected, Workspace workspace,
                   Stream stream) {
  SPARSENET_CHECK(k >= 0 && k <= count, "select_extreme: k must lie in [0, ", count, "], got ", k);
  Scratch scratch = checked_scratch(workspace, count, stream);
  launch_elements("score_keys", score_keys_kernel, count, stream,
                  ScoreKeys{scores, count, highest, scratch.sort.keys, scratch.sort.payload, scratch.first_fault});
  radix_sort(scratch.sort, 32, stream);
  launch_elements("copy_indices", copy_indices_kernel, k, stream, CopyIndices{scratch.sort.payload, selected, k});
  const Finding finding = fetch_fault(scratch, stream);
  if (finding.index >= 0) fail("select_extreme: scores must not be NaN, got NaN at ", finding.index);
}

void inactive_places(const PatternView& pattern, int32_t* place_rows, int32_t* place_cols, Stream stream) {
  launch_elements(
      "inactive_places", inactive_places_kernel, pattern.block_rows() * pattern.block_cols(), stream,
      InactivePlaces{pattern.crow, pattern.col, pattern.block_rows(), pattern.block_cols(), place_rows, place_cols});
}

void update_pattern(const PatternUpdate& op, Workspace workspace, Stream stream) {
  const PatternView& old_pattern = op.old_pattern;
  check_arrays(op.out);
  SPARSENET_CHECK(op.num_dropped >= 0 && op.num_dropped <= old_pattern.num_blocks && op.num_grown >= 0,
                  "update_pattern: num_dropped must lie in [0, ", old_pattern.num_blocks,
                  "] and num_grown not be negative, got ", op.num_dropped, " and ", op.num_grown);
  SPARSENET_CHECK(op.out.num_blocks == old_pattern.num_blocks - op.num_dropped + op.num_grown,
                  "update_pattern: num_blocks must be ", old_pattern.num_blocks - op.num_dropped + op.num_grown,
                  ", got ", op.out.num_blocks);
  SPARSENET_CHECK(op.out.block_rows == old_pattern.block_rows() && op.out.block_cols == old_pattern.block_cols(),
                  "update_pattern: the shape must stay [", old_pattern.block_rows(), ", ", old_pattern.block_cols(),
                  "], got [", op.out.block_rows, ", ", op.out.block_cols, "]");
  const int64_t count = old_pattern.num_blocks + op.num_grown;
  Scratch scratch = checked_scratch(workspace, count, stream);
  fill_bytes(scratch.flags, 0, count * static_cast<int64_t>(sizeof(int32_t)), stream);
  launch_elements("mark_dropped", mark_dropped_kernel, op.num_dropped, stream,
                  MarkDropped{op.dropped, scratch.flags, op.num_dropped, old_pattern.num_blocks, scratch.first_fault});
  PatternKeys keys = keys_of(op.out, scratch);
  keys.rows = old_pattern.row;
  keys.cols = old_pattern.col;
  keys.dropped = scratch.flags;
  keys.grown_rows = op.grown_rows;
  keys.grown_cols = op.grown_cols;
  keys.num_old = old_pattern.num_blocks;
  keys.count = count;
  keys.dropped_key = static_cast<uint64_t>(op.out.block_rows * op.out.block_cols);
  finish_pattern(scratch, keys, op.dropped, op.out, op.source, stream);
}

void gather_blocks(const void* in, const int32_t* source, void* out, int64_t num_blocks, int64_t block_bytes,
                   Stream stream) {
  SPARSENET_CHECK(num_blocks >= 0 && block_bytes >= 0, "gather_blocks: sizes must not be negative, got ", num_blocks,
                  " blocks of ", block_bytes, " bytes");
  const uint64_t alignment =
      reinterpret_cast<uintptr_t>(in) | reinterpret_cast<uintptr_t>(out) | static_cast<uint64_t>(block_bytes);
  const auto run = [&](auto word, const char* name) {
    using Word = decltype(word);
    const int64_t words = block_bytes / static_cast<int64_t>(sizeof(Word));
    launch_elements(name, gather_blocks_kernel<Word>, num_blocks * words, stream,
                    GatherBlocks{in, source, out, num_blocks, words});
  };
  if (alignment % 16 == 0)
    run(Word16{}, "gather_blocks_16");
  else if (alignment % 4 == 0)
    run(uint32_t{}, "gather_blocks_4");
  else if (alignment % 2 == 0)
    run(uint16_t{}, "gather_blocks_2");
  else
    run(uint8_t{}, "gather_blocks_1");
}

int64_t work_list_capacity(int64_t num_rows, int64_t num_blocks, int32_t rows_per_group, int64_t split_length) {
  SPARSENET_CHECK(rows_per_group >= 1 && split_length >= 1,
                  "work_list: rows_per_group and split_length must be at least 1, got ", rows_per_group, " and ",
                  split_length);
  return ceil_div(num_rows, rows_per_group) + num_blocks / split_length;
}

WorkList build_work_list(const int32_t* crow, int64_t num_rows, int64_t num_blocks, int32_t rows_per_group,
                         int64_t split_length, WorkItem* items, Workspace workspace, Stream stream) {
  const int64_t capacity = work_list_capacity(num_rows, num_blocks, rows_per_group, split_length);
  SPARSENET_CHECK(capacity <= 2147483647, "work_list: the list must have at most 2147483647 items, got ", capacity);
  if (num_rows == 0) return {items, 0, 0, rows_per_group};
  const Scratch scratch = checked_scratch(workspace, 0, stream);
  launch("work_list", work_list_kernel,
         {.ctas = 1,
          .threads = ScanConfig::kThreads,
          .shared_bytes = static_cast<int64_t>(sizeof(int32_t)) * (ScanConfig::kWarps + 1)},
         stream,
         MakeWorkList{crow, num_rows, ceil_div(num_rows, rows_per_group), rows_per_group, split_length, items,
                      scratch.counts});
  int32_t counts[2] = {0, 0};
  copy_to_host(counts, scratch.counts, sizeof(counts), stream);
  return {items, counts[0], counts[1], rows_per_group};
}

} // namespace sparsenet::cuda
