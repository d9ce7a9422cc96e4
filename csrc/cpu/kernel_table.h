// The table of kernels, one for each instruction set: op x dtype -> the function that computes it.
//
//                     float32   bfloat16   float16   float64
//   avx512bf16           x         x          .         .        bfloat16 in pairs (vdpbf16ps)
//   avx512               x         x          .         .
//   avx2                 x         x          .         .
//   portable             x         x          x         x
//                                             . served by the portable set
//
// A new dtype is a type in by_dtype() (dispatch.h), a new op a row in KernelTable and in Kernels. What depends on the
// block size, the width of a small batch or the activation is chosen inside an op, by the functions of dispatch.h.
#pragma once

#include "../types.h"

namespace sparsenet::cpu {

constexpr int kNumDTypes = 4; // of DType

// Arguments are checked before they come here; `threads` is at least 1.
template <class Op> using Kernel = void (*)(const Op&, int threads);

// One op's kernels, by DType; null where the portable set serves the dtype.
template <class Op> struct Row {
  Kernel<Op> by_dtype[kNumDTypes];
};

struct KernelTable {
  const char* name; // of the instruction set
  const Row<LinearForward>* linear_forward;
  const Row<LinearBackward>* linear_backward;
  const Row<GradientNorms>* gradient_norms;
  const Row<CandidateGradients>* candidate_gradients;
};

// The sets that this build has are those whose SPARSENET_HAVE_<NAME> is defined.
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

} // namespace sparsenet::cpu

#if defined(SPARSENET_ISA) // in the sources of one set: its rows, each defined in its op's source
namespace sparsenet::cpu::SPARSENET_ISA {
extern const Row<LinearForward> kLinearForward;
extern const Row<LinearBackward> kLinearBackward;
extern const Row<GradientNorms> kGradientNorms;
extern const Row<CandidateGradients> kCandidateGradients;
} // namespace sparsenet::cpu::SPARSENET_ISA
#endif
