// Instruction sets: which the machine has, which one runs, and the table of kernels of each.
#pragma once

#include "../types.h"

namespace sparsenet::cpu {

// The ops of one instruction set. Arguments are checked before they come here.
struct KernelTable {
  const char* name;
  void (*linear_forward)(const LinearForward&, int threads);
  void (*linear_backward)(const LinearBackward&, int threads);
  void (*gradient_norms)(const GradientNorms&, int threads);
  void (*candidate_gradients)(const CandidateGradients&, int threads);
};

namespace portable {
extern const KernelTable kTable;
}
namespace avx2 {
extern const KernelTable kTable;
}
namespace avx512 {
extern const KernelTable kTable;
}
namespace avx512bf16 {
extern const KernelTable kTable;
}

// The best set this machine has, or the one SPARSENET_ISA names; read once. Throws std::invalid_argument for an unknown
// name and for a set the machine lacks.
const KernelTable& active_table();

// The table that serves `dtype`: the active one; float64 and float16 are always served by the portable one.
const KernelTable& table_for(DType dtype);

// Names of the sets this machine can run, best first; null-terminated.
const char* const* available_sets();

// Threads an op may use: `wanted` (what torch says), but 1 in a process forked from one with several threads, because
// libgomp's worker threads do not survive a fork.
int usable_threads(int wanted);

} // namespace sparsenet::cpu
