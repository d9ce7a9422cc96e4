// forward on tensor cores: the instantiations, for large and small batches.
#include "block_sparse_linear_product_sm80.cuh"

#include "block_sparse_linear_small_batch_sm80.cuh"

namespace sparsenet::cuda {

template void launch_product_sm80<bfloat16, false>(const Product<bfloat16>&, Stream);
template void launch_product_sm80<float16, false>(const Product<float16>&, Stream);
template void launch_product_sm80<float, false>(const Product<float>&, Stream);
template void launch_product_small_batch_sm80<bfloat16>(const Product<bfloat16>&, Stream);
template void launch_product_small_batch_sm80<float16>(const Product<float16>&, Stream);
template void launch_product_small_batch_sm80<float>(const Product<float>&, Stream);

} // namespace sparsenet::cuda
