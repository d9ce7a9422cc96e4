// Every CUDA op, as plain C++: views in, nothing allocated, nothing synchronised except where said. The caller makes
// the device current and passes its stream; scratch memory comes as a Workspace of at least *_workspace_bytes.
// Wrong arguments throw std::invalid_argument, failed launches std::runtime_error naming kernel and grid.
#pragma once

#include <cstdint>
#include <string>

#include "../../types.h"

namespace sparsenet::cuda {

using Stream = std::uintptr_t; // a cudaStream_t

// float32 in memory, but tensor cores may take its products of operands rounded to tf32's 10 bits.
inline constexpr DType kTf32{4};

struct Workspace {
  void* data = nullptr; // 256-byte aligned, as every allocator of device memory gives it
  int64_t bytes = 0;
};

// Which kernels may run. `automatic` lets choose() decide by arch, dtype, block size, batch and alignment; a forced
// variant that can't serve a call throws. For tests and benches; process-wide.
enum class Variant : int32_t { automatic = 0, simt = 1, sm80 = 2 };
void force_variant(Variant variant);
Variant forced_variant();

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

// block_sparse_linear ------------------------------------------------------------------------------------------
// Name of the kernel that would run ("forward_sm80", "forward_simt", ...), for tests, benches and build_info.
std::string choose_linear_forward(const LinearForward& op);
std::string choose_grad_input(const LinearBackward& op);
std::string choose_grad_weight(const LinearBackward& op);
// Block rows that a CTA of the automatic variant shares an X tile between: the rows_per_group to build a WorkList with.
int32_t preferred_rows_per_group(DType dtype, int32_t block_size);
// How to build the work list of a call: rows_per_group and split_length (0: the kernel reads no list). Depends on the
// batch only through its power of two. Heuristics that have not been timed yet.
struct WorkShape {
  int32_t rows_per_group = 1;
  int64_t split_length = 0;
};
WorkShape preferred_work(const PatternView& pattern, DType dtype, int64_t batch, bool transposed);

int64_t linear_forward_workspace_bytes(const LinearForward& op, const WorkList& work);
void linear_forward(const LinearForward& op, const WorkList& work, Workspace workspace, Stream stream);

// `work` describes the transposed index (block columns); used by grad_x only.
int64_t linear_backward_workspace_bytes(const LinearBackward& op, const WorkList& work);
void linear_backward(const LinearBackward& op, const WorkList& work, Workspace workspace, Stream stream);

// grad_z = grad_y * activation'(saved), all [M, N]: the gradient before the activation, for gradient_norms.
struct ActivationBackward {
  DType dtype = DType::float32;
  Activation activation = Activation::none;
  Matrix grad_y;
  Matrix saved;
  Matrix grad_z;
};
void activation_backward(const ActivationBackward& op, Stream stream);

// block_gradient_squared_norms -----------------------------------------------------------------------------------
std::string choose_gradient_norms(const GradientNorms& op);
int64_t gradient_norms_workspace_bytes(const GradientNorms& op);
void gradient_norms(const GradientNorms& op, Workspace workspace, Stream stream);

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
int64_t candidate_gradients_workspace_bytes(const PlaceGradients& op);
void candidate_gradients(const PlaceGradients& op, Workspace workspace, Stream stream);

// block_pattern ----------------------------------------------------------------------------------------------------
// Index arrays being written: sizes as in PatternView.
struct PatternArrays {
  int32_t* crow = nullptr;    // [block_rows + 1]
  int32_t* col = nullptr;     // [num_blocks]
  int32_t* row = nullptr;     // [num_blocks]
  int32_t* t_crow = nullptr;  // [block_cols + 1]
  int32_t* t_row = nullptr;   // [num_blocks]
  int32_t* t_block = nullptr; // [num_blocks]
  int64_t block_rows = 0;
  int64_t block_cols = 0;
  int64_t num_blocks = 0;
};

// Enough for every call below on `count` blocks, places or scores (for update_pattern: old blocks + grown places) of
// a pattern with that many block rows and columns.
int64_t pattern_workspace_bytes(int64_t count, int64_t block_rows, int64_t block_cols);

// Canonical pattern from places in any order; order[i] is the place that became block i. Waits for the stream and
// throws on an index out of range or a duplicate.
void pattern_from_places(const int32_t* place_rows, const int32_t* place_cols, const PatternArrays& out, int32_t* order,
                         Workspace workspace, Stream stream);

// Row pointers and columns on the device, as Python was given them.
struct CsrSource {
  const int32_t* crow = nullptr; // [crow_length]
  const int32_t* col = nullptr;  // [out.num_blocks]
  int64_t crow_length = 0;
  int64_t rows = 0; // of the matrix, elements
  int64_t cols = 0;
  int64_t block_size = 1;
};
// Checks and copies them and adds the transposed index. Waits for the stream; refuses what the CPU refuses, in the same
// words.
void pattern_from_csr(const CsrSource& source, const PatternArrays& out, Workspace workspace, Stream stream);

// selected[0..k) = indices of the k lowest (or highest) scores, best first, equal scores by lower index. Waits for the
// stream and throws on NaN.
void select_scores(const float* scores, int64_t count, int64_t k, bool highest, int32_t* selected, Workspace workspace,
                   Stream stream);

// Every place without a block, in row order: rows[i], cols[i] for i < block_rows * block_cols - num_blocks.
void inactive_places(const PatternView& pattern, int32_t* place_rows, int32_t* place_cols, Stream stream);

// New pattern = old blocks without `dropped`, plus the grown places. source[i] is the old number of new block i, or
// -1 - j for grown place j. Waits for the stream; throws on a duplicate (a grown place that is active).
struct PatternUpdate {
  PatternView old_pattern;
  const int32_t* dropped = nullptr; // [num_dropped] block numbers
  int64_t num_dropped = 0;
  const int32_t* grown_rows = nullptr; // [num_grown]
  const int32_t* grown_cols = nullptr; // [num_grown]
  int64_t num_grown = 0;
  PatternArrays out;
  int32_t* source = nullptr; // [out.num_blocks]
};
void update_pattern(const PatternUpdate& op, Workspace workspace, Stream stream);

// out[i] = in[source[i]], zeros where source[i] < 0: values, gradients and optimizer moments after a rewire.
void gather_blocks(const void* in, const int32_t* source, void* out, int64_t num_blocks, int64_t block_bytes,
                   Stream stream);

// compact_blocks --------------------------------------------------------------------------------------------------
// The op of the CPU (types.h) with every array on the device; rows and cols lie within the old matrix.
void compact_blocks(const CompactBlocks& op, Stream stream);

// Work list of `groups` = ceil(block_rows / rows_per_group) groups; groups with more than split_length blocks are cut.
// items has room for work_list_capacity(...). Waits for the stream; returns the list over `items`.
int64_t work_list_capacity(int64_t num_rows, int64_t num_blocks, int32_t rows_per_group, int64_t split_length);
WorkList build_work_list(const int32_t* crow, int64_t num_rows, int64_t num_blocks, int32_t rows_per_group,
                         int64_t split_length, WorkItem* items, Workspace workspace, Stream stream);

} // namespace sparsenet::cuda
