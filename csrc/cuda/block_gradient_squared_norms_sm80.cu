// block_gradient_squared_norms on tensor cores: the instantiations.
#include "block_gradient_squared_norms_sm80.cuh"

namespace sparsenet::cuda {

template void launch_gradient_norms_sm80<bfloat16>(const GradientNormsParams<bfloat16>&, Stream);
template void launch_gradient_norms_sm80<float16>(const GradientNormsParams<float16>&, Stream);
template void launch_gradient_norms_sm80<float>(const GradientNormsParams<float>&, Stream);

} // namespace sparsenet::cuda
