// block_gradient_squared_norms on any architecture: the instantiations.
#include "block_gradient_squared_norms_simt.cuh"

namespace sparsenet::cuda {

template void launch_gradient_norms_simt<float>(const GradientNormsParams<float>&, Stream);
template void launch_gradient_norms_simt<double>(const GradientNormsParams<double>&, Stream);
template void launch_gradient_norms_simt<bfloat16>(const GradientNormsParams<bfloat16>&, Stream);
template void launch_gradient_norms_simt<float16>(const GradientNormsParams<float16>&, Stream);

} // namespace sparsenet::cuda
