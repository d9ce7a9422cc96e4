// Plain Python tuples that cross as C++ structs. To be replaced by csrc/boundary.h.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "../../types.h"
#include "ops.h"

namespace sparsenet {

using Address = std::uintptr_t;

inline void* at(Address address) { return reinterpret_cast<void*>(address); } // NOLINT: Python keeps the tensor alive

struct LinearCall {
  DType dtype;
  Activation activation;
  int threads;
};

struct GradientCall {
  DType dtype;
  int64_t block_size;
  int threads;
};

} // namespace sparsenet

namespace pybind11::detail {

template <size_t kCount> struct Numbers {
  int64_t values[kCount];
  bool load(handle source) {
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != Py_ssize_t(kCount)) return false;
    for (size_t i = 0; i < kCount; ++i) {
      make_caster<int64_t> number;
      if (!number.load(PyTuple_GET_ITEM(source.ptr(), Py_ssize_t(i)), true)) return false;
      values[i] = number;
    }
    return true;
  }
};

template <> struct type_caster<sparsenet::Matrix> {
  PYBIND11_TYPE_CASTER(sparsenet::Matrix, const_name("tuple[int, int, int, int]"));
  bool load(handle source, bool) {
    Numbers<4> n;
    if (!n.load(source)) return false;
    value = {sparsenet::at(sparsenet::Address(n.values[0])), n.values[1], n.values[2], n.values[3]};
    return true;
  }
};

template <> struct type_caster<sparsenet::LinearCall> {
  PYBIND11_TYPE_CASTER(sparsenet::LinearCall, const_name("tuple[int, int, int]"));
  bool load(handle source, bool) {
    Numbers<3> n;
    if (!n.load(source)) return false;
    value = {sparsenet::DType(n.values[0]), sparsenet::Activation(n.values[1]), int(n.values[2])};
    return true;
  }
};

template <> struct type_caster<sparsenet::GradientCall> {
  PYBIND11_TYPE_CASTER(sparsenet::GradientCall, const_name("tuple[int, int, int]"));
  bool load(handle source, bool) {
    Numbers<3> n;
    if (!n.load(source)) return false;
    value = {sparsenet::DType(n.values[0]), n.values[1], int(n.values[2])};
    return true;
  }
};

} // namespace pybind11::detail

namespace sparsenet::cuda {

// Lives as long as the call that was given it: the Python function it refers to is one of that call's arguments.
inline Run run_of(const pybind11::tuple& run) {
  SPARSENET_CHECK(run.size() == 2, "run must be (stream, allocate), got ", run.size(), " entries");
  const pybind11::handle allocate = run[1].ptr();
  return {.stream = run[0].cast<Stream>(), .allocate = [allocate](int64_t bytes) {
            const pybind11::gil_scoped_acquire acquire;
            return at(allocate(bytes).cast<Address>());
          }};
}

// A validated pattern on the device with its work lists. It owns nothing: the Python object that made the index tensors
// keeps them alive.
struct Pattern {
  PatternView view;
  WorkList forward;
  WorkList transposed;
};

} // namespace sparsenet::cuda
