// One instruction set's table. Compiled once for each set, as the ops are.
#include "kernel_table.h"

#define SPARSENET_NAME_(x) #x
#define SPARSENET_NAME(x) SPARSENET_NAME_(x)

namespace sparsenet::cpu {

constinit const KernelTable SPARSENET_ISA::kTable = {.name = SPARSENET_NAME(SPARSENET_ISA),
                                                     .linear_forward = &SPARSENET_ISA::kLinearForward,
                                                     .linear_backward = &SPARSENET_ISA::kLinearBackward,
                                                     .gradient_norms = &SPARSENET_ISA::kGradientNorms,
                                                     .candidate_gradients = &SPARSENET_ISA::kCandidateGradients};

} // namespace sparsenet::cpu
