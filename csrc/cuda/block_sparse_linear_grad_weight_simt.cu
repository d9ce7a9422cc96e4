#include "block_sparse_linear_grad_weight_simt.cuh"

namespace sparsenet::cuda {

template void launch_grad_weight_simt<float>(const OuterProduct<float>&, Stream);
template void launch_grad_weight_simt<double>(const OuterProduct<double>&, Stream);
template void launch_grad_weight_simt<bfloat16>(const OuterProduct<bfloat16>&, Stream);
template void launch_grad_weight_simt<float16>(const OuterProduct<float16>&, Stream);
template void launch_gradient_norms_simt<float>(const OuterProduct<float>&, Stream);
template void launch_gradient_norms_simt<double>(const OuterProduct<double>&, Stream);
template void launch_gradient_norms_simt<bfloat16>(const OuterProduct<bfloat16>&, Stream);
template void launch_gradient_norms_simt<float16>(const OuterProduct<float16>&, Stream);

} // namespace sparsenet::cuda
