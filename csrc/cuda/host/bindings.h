// Registers every CUDA op in a Python module: `_C.cuda` of the product, and the emulated test module. The signatures
// are the same in both, and those of the CPU's module (csrc/bindings.cpp) with one argument more at the end:
// run = (stream, allocate), where allocate(bytes) -> address hands out scratch memory that lives until the call's
// kernels have run. An index array is (address, length); addresses and streams are integers.
#pragma once

#include <pybind11/pybind11.h>

namespace sparsenet {

void register_cuda(pybind11::module_& module);

} // namespace sparsenet
