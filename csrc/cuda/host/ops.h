// Every CUDA op, as plain C++: views in, results written on a stream. Nothing here knows Python or PyTorch.
//
// NOTHING IN csrc/cuda HAS RUN ON HARDWARE YET. nvcc compiles it for sm_80 and sm_90a, and an emulator on the host
// (tests/cuda/emulator) runs and checks every kernel. Bytes and FLOP in the kernels' headers are arithmetic, tile
// sizes, stage counts and the heuristics of choose.cu are untuned, and no share of peak has been measured.
//
// The caller makes the device current. A call checks its arguments, plans once (which kernels, what must be copied,
// how the work is cut), asks once for its scratch memory, and launches; it waits for the stream only where said. Wrong
// arguments throw std::invalid_argument, failed launches std::runtime_error naming kernel and grid.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "../../checks.h"
#include "../../types.h"

namespace sparsenet::cuda {

using Stream = std::uintptr_t; // a cudaStream_t

// Where a call runs, and where its scratch memory comes from: at least that many bytes of the device's memory, on a
// 16-byte boundary, that stay valid until the kernels of this call have run.
struct Run {
  Stream stream = 0;
  std::function<void*(int64_t bytes)> allocate;

  void* scratch(int64_t bytes) const {
    if (bytes == 0) return nullptr;
    void* data = allocate(bytes);
    SPARSENET_CHECK(data != nullptr && reinterpret_cast<std::uintptr_t>(data) % 16 == 0,
                    "scratch memory must start at a multiple of 16 bytes, got address ",
                    reinterpret_cast<std::uintptr_t>(data));
    return data;
  }
};

// Which kernels may run. `automatic` lets choose.cu decide by arch, dtype, block size, batch and alignment; a forced
// variant that can't serve a call throws. For tests and benches; process-wide.
enum class Variant : int32_t { automatic = 0, simt = 1, sm80 = 2 };
void force_variant(Variant variant);

struct DeviceInfo {
  std::string name;
  int arch = 0; // 10 * major + minor
  int num_multiprocessors = 0;
  int64_t shared_bytes_per_cta = 0;
  int64_t l2_bytes = 0;
  int64_t memory_bytes = 0;
  int driver_version = 0;  // 1000 * major + 10 * minor; 0 without a driver
  int runtime_version = 0; // the toolkit this was built with
  int num_devices = 0;
  std::string status; // "ok", or one line saying why no device can be used
};
// Never throws; `status` says what is missing: no driver, no device, or a driver older than the toolkit.
DeviceInfo device_info();

// Work lists -------------------------------------------------------------------------------------------------------
// One CTA-sized piece of a product: blocks [piece, pieces) of the k-range of a group of block rows (forward) or block
// columns (grad_input). Pieces of a split group write fp32 partial sums to slots slot + piece; a second kernel adds
// them in order.
struct WorkItem {
  int32_t group;
  int32_t piece;
  int32_t pieces;
  int32_t slot; // first slot of the group, -1 when it is not split
};

// Longest groups first. Made by build_work_list, kept by the pattern's owner; empty: one item per group in row order.
struct WorkList {
  const WorkItem* items = nullptr;
  int32_t num_items = 0;
  int32_t num_slots = 0;
  int32_t rows_per_group = 1;
};

// How a list is built: block rows (or columns) of a group, and the number of blocks above which a group is cut.
struct WorkShape {
  int32_t rows_per_group = 1;
  int64_t split_length = 0; // 0: the kernel reads no list
};
// Block rows that a CTA of the automatic variant shares an X tile between: the rows_per_group to build a list with.
int32_t preferred_rows_per_group(DType dtype, int32_t block_size);
// The list that suits a call. Depends on the batch only through its power of two.
WorkShape preferred_work(const PatternView& pattern, DType dtype, int64_t batch, bool transposed);

// The lines of an index: its block rows, or the block columns of the transposed one.
struct Lines {
  const int32_t* pointers = nullptr; // [num_lines + 1]
  int64_t num_lines = 0;
  int64_t num_blocks = 0;
};
// Items that a list can have: `items` below has room for as many. Waits for the stream; returns the list over `items`.
int64_t work_list_capacity(const Lines& lines, const WorkShape& shape);
WorkList build_work_list(const Lines& lines, const WorkShape& shape, WorkItem* items, const Run& run);

// block_sparse_linear ----------------------------------------------------------------------------------------------
void linear_forward(const LinearForward& op, const WorkList& work, const Run& run);
// `work` describes the transposed index (block columns); used by grad_x only.
void linear_backward(const LinearBackward& op, const WorkList& work, const Run& run);
// Names of the kernels that would run ("forward_sm80", ...), for tests and benches.
std::string choose_linear_forward(const LinearForward& op);
struct BackwardNames {
  std::string grad_input;
  std::string grad_weight;
};
BackwardNames choose_linear_backward(const LinearBackward& op);

// to[m, n] = from[m, n], rows by their strides: how operands get rows on 16-byte boundaries.
void copy_rows(DType dtype, const Matrix& from, const Matrix& to, Stream stream);

// block_gradient_squared_norms, candidate_gradients ----------------------------------------------------------------
void gradient_norms(const GradientNorms& op, const Run& run);

// The dense gradient's blocks at a list of places in any order: grads[i] = block (place_rows[i], place_cols[i]) of
// grad_z^T x. A CTA gathers its operands place by place, so no row index is needed (the CPU op's CandidateGradients
// has one).
struct PlaceGradients {
  DType dtype = DType::float32;
  int32_t block_size = 1;
  Matrix x;                            // [M, in]
  Matrix grad_z;                       // [M, out]
  const int32_t* place_rows = nullptr; // [num_places], within the matrix
  const int32_t* place_cols = nullptr; // [num_places]
  int64_t num_places = 0;
  void* grads = nullptr; // [num_places, b, b], same dtype
};
void candidate_gradients(const PlaceGradients& op, const Run& run);

// block_pattern ----------------------------------------------------------------------------------------------------
// Index arrays being written: sizes as in PatternView.
struct PatternArrays {
  int32_t* crow = nullptr;    // [block_rows + 1]
  int32_t* col = nullptr;     // [num_blocks]
  int32_t* row = nullptr;     // [num_blocks]
  int32_t* t_crow = nullptr;  // [block_cols + 1]
  int32_t* t_row = nullptr;   // [num_blocks]
  int32_t* t_block = nullptr; // [num_blocks]
};

// Row pointers and columns on the device, as Python was given them, and the order that sorts the columns stably
// (torch.sort makes it): block numbers by block column.
struct CsrSource {
  const int32_t* crow = nullptr;  // [crow_length]
  const int32_t* col = nullptr;   // [num_blocks]
  const int64_t* order = nullptr; // [num_blocks]
  int64_t crow_length = 0;
  int64_t num_blocks = 0;
  int64_t rows = 0; // of the matrix, elements
  int64_t cols = 0;
  int64_t block_size = 1;
};
// Checks and copies them and adds the transposed index. Waits for the stream; refuses what the CPU refuses, in the same
// words.
void pattern_from_csr(const CsrSource& source, const PatternArrays& out, const Run& run);

// compact_blocks ---------------------------------------------------------------------------------------------------
// The op of the CPU (types.h) with every array on the device; rows and cols lie within the old matrix.
void compact_blocks(const CompactBlocks& op, const Run& run);

} // namespace sparsenet::cuda
