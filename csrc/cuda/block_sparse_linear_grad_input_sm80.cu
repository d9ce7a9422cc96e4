// grad_input on tensor cores: the instantiations.
#include "block_sparse_linear_product_sm80.cuh"

namespace sparsenet::cuda {

template void launch_product_sm80<bfloat16, true>(const Product<bfloat16>&, Stream);
template void launch_product_sm80<float16, true>(const Product<float16>&, Stream);
template void launch_product_sm80<float, true>(const Product<float>&, Stream);

} // namespace sparsenet::cuda
