// grad_weight on tensor cores: the instantiations.
#include "block_sparse_linear_grad_weight_sm80.cuh"

namespace sparsenet::cuda {

template void launch_grad_weight_sm80<bfloat16>(const GradWeight<bfloat16>&, Stream);
template void launch_grad_weight_sm80<float16>(const GradWeight<float16>&, Stream);
template void launch_grad_weight_sm80<float>(const GradWeight<float>&, Stream);

} // namespace sparsenet::cuda
