// Instruction sets: which this machine has, which one is in use, and the kernels that it gives.
#pragma once

#include "kernel_table.h"

namespace sparsenet::cpu {

// Name of the set in use: the best that this machine has, or the one that the environment variable SPARSENET_ISA names;
// read once. Throws std::invalid_argument for an unknown name and for a set that the machine lacks.
const char* active_set();

// Names of the sets that this machine can run, best first; null-terminated.
const char* const* available_sets();

// One kernel of every op for one dtype.
struct Kernels {
  Kernel<LinearForward> linear_forward;
  Kernel<LinearBackward> linear_backward;
  Kernel<GradientNorms> gradient_norms;
  Kernel<CandidateGradients> candidate_gradients;
};

// Those of the set in use, and the portable ones where it has none for `dtype`. Throws std::invalid_argument for a
// number that is no dtype.
const Kernels& kernels_for(DType dtype);

} // namespace sparsenet::cpu
