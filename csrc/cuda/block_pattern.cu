// block_pattern on CUDA: index arrays that Python was given, checked, copied and transposed, and work lists, all on the
// device. The host waits only to learn whether the input was right, and how long a work list became. Sorting is
// torch's.
#include "block_pattern_simt.cuh"

namespace sparsenet::cuda {

namespace {

constexpr const char* kOp = "BlockPattern"; // as on the CPU: the same input, the same message

struct Finding {
  Fault fault = Fault::pointer_start;
  int64_t index = -1; // -1: nothing wrong
};

Finding fetch_fault(const unsigned long long* first_fault, Stream stream) {
  unsigned long long packed = kNoFault;
  copy_to_host(&packed, first_fault, sizeof(packed), stream);
  if (packed == kNoFault) return {};
  return {static_cast<Fault>(packed & 0xff), static_cast<int64_t>((packed & ~(0xfull << 60)) >> 8)};
}

template <typename T>
T fetch(const T* array, int64_t index, Stream stream) {
  T value = 0;
  copy_to_host(&value, array + index, sizeof(value), stream);
  return value;
}

void refuse(const Finding& finding, const ReadCsr& csr, Stream stream) {
  const CsrSource& source = csr.source;
  const int64_t i = finding.index;
  switch (finding.fault) {
  case Fault::pointer_start:
    fail(kOp, ": crow_indices must begin with 0, got ", fetch(source.crow, 0, stream));
  case Fault::pointer_end:
    fail(kOp, ": crow_indices must end with the number of blocks ", source.num_blocks, ", got ",
         fetch(source.crow, csr.block_rows, stream));
  case Fault::pointer_order:
    fail(kOp, ": crow_indices must not decrease, got ", fetch(source.crow, i, stream), " then ",
         fetch(source.crow, i + 1, stream), " at row ", i);
  case Fault::col_range:
    fail(kOp, ": col_indices must lie in [0, ", csr.block_cols, "), got ", fetch(source.col, i, stream),
         " in block row ", fetch(csr.out.row, i, stream));
  case Fault::col_order:
    fail(kOp, ": col_indices must ascend within a block row without duplicates, got ", fetch(source.col, i - 1, stream),
         " then ", fetch(source.col, i, stream), " in block row ", fetch(csr.out.row, i, stream));
  default:
    fail(kOp, ": order must sort the columns stably, got block ", fetch(source.order, i, stream), " at ", i);
  }
}

} // namespace

void pattern_from_csr(const CsrSource& source, const PatternArrays& out, const Run& run) {
  check_pattern_sizes(source.crow_length, source.num_blocks, source.rows, source.cols, source.block_size);
  ReadCsr csr{.source = source,
              .out = out,
              .block_rows = ceil_div(source.rows, source.block_size),
              .block_cols = ceil_div(source.cols, source.block_size),
              .first_fault = static_cast<unsigned long long*>(run.scratch(sizeof(kNoFault)))};
  fill_bytes(csr.first_fault, 0xff, sizeof(kNoFault), run.stream);
  launch_elements("read_pointers", read_pointers_kernel, csr.block_rows + 1, run.stream, csr);
  launch_elements("read_columns", read_columns_kernel, source.num_blocks, run.stream, csr);
  launch_elements("transpose_index", transpose_index_kernel, source.num_blocks, run.stream, csr);
  launch_elements("transpose_pointers", transpose_pointers_kernel, csr.block_cols + 1, run.stream, csr);
  const Finding finding = fetch_fault(csr.first_fault, run.stream);
  if (finding.index >= 0) refuse(finding, csr, run.stream);
}

int64_t work_list_capacity(const Lines& lines, const WorkShape& shape) {
  SPARSENET_CHECK(shape.rows_per_group >= 1 && shape.split_length >= 1,
                  "work_list: rows_per_group and split_length must be at least 1, got ", shape.rows_per_group, " and ",
                  shape.split_length);
  return ceil_div(lines.num_lines, shape.rows_per_group) + lines.num_blocks / shape.split_length;
}

WorkList build_work_list(const Lines& lines, const WorkShape& shape, WorkItem* items, const Run& run) {
  const int64_t capacity = work_list_capacity(lines, shape);
  SPARSENET_CHECK(capacity <= kInt32Max, "work_list: the list must have at most 2147483647 items, got ", capacity);
  if (lines.num_lines == 0) return {items, 0, 0, shape.rows_per_group};
  int32_t counts[2] = {0, 0};
  const MakeWorkList params{.lines = lines,
                            .shape = shape,
                            .num_groups = ceil_div(lines.num_lines, shape.rows_per_group),
                            .items = items,
                            .counts = static_cast<int32_t*>(run.scratch(sizeof(counts)))};
  launch("work_list", work_list_kernel,
         {.ctas = 1,
          .threads = ScanConfig::kThreads,
          .shared_bytes = static_cast<int64_t>(sizeof(int32_t)) * (ScanConfig::kWarps + 1)},
         run.stream, params);
  copy_to_host(counts, params.counts, sizeof(counts), run.stream);
  return {items, counts[0], counts[1], shape.rows_per_group};
}

} // namespace sparsenet::cuda
