// What crosses from Python to the CUDA ops besides the structs of csrc/boundary.h: where a call runs, index arrays by
// address, and a pattern on the device.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <utility>

#include "../../boundary.h"
#include "ops.h"

namespace sparsenet::cuda {

// Lives as long as the call that was given it: the Python function it refers to is one of that call's arguments.
inline Run run_of(const pybind11::tuple& run) {
  SPARSENET_CHECK(run.size() == 2, "run must be (stream, allocate), got ", run.size(), " entries");
  const pybind11::handle allocate = run[1].ptr();
  return {.stream = run[0].cast<Stream>(), .allocate = [allocate](int64_t bytes) {
            const pybind11::gil_scoped_acquire acquire;
            return at(allocate(bytes).cast<int64_t>());
          }};
}

// An index array of int32: (address, length).
using IndexArray = std::pair<int64_t, int64_t>;
inline const int32_t* indices_at(const IndexArray& array) { return static_cast<const int32_t*>(at(array.first)); }

using ArrayAddresses = std::array<int64_t, 6>; // crow, col, row, t_crow, t_row, t_block

// A validated pattern on the device with its work lists. It owns nothing: the Python object that made the index tensors
// keeps them alive.
struct Pattern {
  PatternView view;
  WorkList forward;
  WorkList transposed;
};

} // namespace sparsenet::cuda
