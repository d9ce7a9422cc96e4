// grad_weight on any architecture: the instantiations.
#include "block_sparse_linear_grad_weight_simt.cuh"

namespace sparsenet::cuda {

template void launch_grad_weight_simt<float>(const GradWeight<float>&, Stream);
template void launch_grad_weight_simt<double>(const GradWeight<double>&, Stream);
template void launch_grad_weight_simt<bfloat16>(const GradWeight<bfloat16>&, Stream);
template void launch_grad_weight_simt<float16>(const GradWeight<float16>&, Stream);

} // namespace sparsenet::cuda
