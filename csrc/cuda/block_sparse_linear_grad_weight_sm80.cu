#include "block_sparse_linear_grad_weight_sm80.cuh"

namespace sparsenet::cuda {

template void launch_grad_weight_sm80<bfloat16>(const OuterProduct<bfloat16>&, Stream);
template void launch_grad_weight_sm80<float16>(const OuterProduct<float16>&, Stream);
template void launch_grad_weight_sm80<float>(const OuterProduct<float>&, Stream);
template void launch_gradient_norms_sm80<bfloat16>(const OuterProduct<bfloat16>&, Stream);
template void launch_gradient_norms_sm80<float16>(const OuterProduct<float16>&, Stream);
template void launch_gradient_norms_sm80<float>(const OuterProduct<float>&, Stream);

} // namespace sparsenet::cuda
