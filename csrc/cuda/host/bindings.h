// Registers every CUDA op in a Python module: `_C.cuda` of the product, and the emulated test module. The signatures
// are the same in both: pointers, sizes, strides (in elements), dtype and activation codes, and the stream as integers.
#pragma once

#include <pybind11/pybind11.h>

namespace sparsenet {

void register_cuda(pybind11::module_& module);

} // namespace sparsenet
