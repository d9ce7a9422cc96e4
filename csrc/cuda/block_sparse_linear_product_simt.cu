// forward and grad_input on any architecture: the instantiations.
#include "block_sparse_linear_product_simt.cuh"

namespace sparsenet::cuda {

template void launch_product_simt<float, false>(const Product<float>&, Stream);
template void launch_product_simt<float, true>(const Product<float>&, Stream);
template void launch_product_simt<double, false>(const Product<double>&, Stream);
template void launch_product_simt<double, true>(const Product<double>&, Stream);
template void launch_product_simt<bfloat16, false>(const Product<bfloat16>&, Stream);
template void launch_product_simt<bfloat16, true>(const Product<bfloat16>&, Stream);
template void launch_product_simt<float16, false>(const Product<float16>&, Stream);
template void launch_product_simt<float16, true>(const Product<float16>&, Stream);

} // namespace sparsenet::cuda
