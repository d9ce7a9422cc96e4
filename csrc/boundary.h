// How a call crosses from Python, the same on every device: each argument is a plain tuple of integers that becomes one
// of the structs below, so that a signature has at most six arguments and an order of its own is never needed.
//
//   Matrix       (address, rows, cols, stride)       stride in elements; columns are contiguous
//   LinearCall   (dtype, activation, threads)        GradientCall  (dtype, block_size, threads)
//   Weight       (values, bias)                      Outputs       (y, pre_activation)
//   Upstream     (grad_y: Matrix, saved)             Gradients     (grad_x, grad_values, grad_bias)
//   Interval     (begin, end)                        GatheredBlocks (from, to, element_bytes)
//
// Address 0 means: not there, or not wanted. What is not a Matrix lies in one piece, rows after rows.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>

#include "types.h"

namespace sparsenet {

struct LinearCall {
  DType dtype = DType::float32;
  Activation activation = Activation::none;
  int32_t threads = 1; // of no use on a GPU
};

struct GradientCall {
  DType dtype = DType::float32;
  int32_t block_size = 1;
  int32_t threads = 1;
};

struct Weight {
  void* values = nullptr; // [num_blocks, b, b]
  void* bias = nullptr;   // [out] or null
};

struct Outputs {
  void* y = nullptr;              // [M, out]
  void* pre_activation = nullptr; // [M, out] or null
};

struct Upstream {
  Matrix grad_y;         // [M, out]
  void* saved = nullptr; // [M, out], what the activation's derivative needs, or null
};

struct Gradients {
  void* grad_x = nullptr;      // [M, in] or null
  void* grad_values = nullptr; // [num_blocks, b, b] or null
  void* grad_bias = nullptr;   // [out] or null
};

struct Interval {
  int64_t begin = 0;
  int64_t end = 0;
};

// --- the ops that such arguments describe ---

inline LinearForward linear_forward_op(const PatternView& pattern, const LinearCall& call, const Matrix& x,
                                       const Weight& weight, const Outputs& outputs) {
  return {.pattern = pattern,
          .dtype = call.dtype,
          .activation = call.activation,
          .x = x,
          .values = weight.values,
          .bias = weight.bias,
          .y = {outputs.y, x.rows, pattern.rows, pattern.rows},
          .pre_activation = {outputs.pre_activation, x.rows, pattern.rows, pattern.rows}};
}

inline LinearBackward linear_backward_op(const PatternView& pattern, const LinearCall& call, const Matrix& x,
                                         const void* values, const Upstream& upstream, const Gradients& grads) {
  return {.pattern = pattern,
          .dtype = call.dtype,
          .activation = call.activation,
          .grad_y = upstream.grad_y,
          .saved = {upstream.saved, x.rows, pattern.rows, pattern.rows},
          .x = x,
          .values = values,
          .grad_x = {grads.grad_x, x.rows, pattern.cols, pattern.cols},
          .grad_values = grads.grad_values,
          .grad_bias = grads.grad_bias};
}

inline GradientNorms gradient_norms_op(const GradientCall& call, const Matrix& x, const Matrix& grad_z,
                                       const Interval& block_rows, void* norms) {
  return {.dtype = call.dtype,
          .block_size = call.block_size,
          .x = x,
          .grad_z = grad_z,
          .block_row_begin = block_rows.begin,
          .block_row_end = block_rows.end,
          .norms = static_cast<float*>(norms)};
}

// --- reading the tuples ---

// The integers of a tuple of exactly N; false, with no Python error set, for anything else.
template <size_t N> bool integers(pybind11::handle source, std::array<int64_t, N>& into) {
  if (!PyTuple_CheckExact(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != Py_ssize_t(N)) return false;
  for (size_t i = 0; i < N; ++i) {
    PyObject* item = PyTuple_GET_ITEM(source.ptr(), Py_ssize_t(i));
    if (!PyLong_CheckExact(item)) return false;
    into[i] = PyLong_AsLongLong(item);
    if (into[i] == -1 && PyErr_Occurred() != nullptr) {
      PyErr_Clear();
      return false;
    }
  }
  return true;
}

inline void* at(int64_t address) { return reinterpret_cast<void*>(address); }

inline void assign(Matrix& m, const std::array<int64_t, 4>& is) { m = {at(is[0]), is[1], is[2], is[3]}; }
inline void assign(LinearCall& c, const std::array<int64_t, 3>& is) {
  c = {DType(is[0]), Activation(is[1]), int32_t(is[2])};
}
inline void assign(GradientCall& c, const std::array<int64_t, 3>& is) {
  c = {DType(is[0]), int32_t(is[1]), int32_t(is[2])};
}
inline void assign(Weight& w, const std::array<int64_t, 2>& is) { w = {at(is[0]), at(is[1])}; }
inline void assign(Outputs& o, const std::array<int64_t, 2>& is) { o = {at(is[0]), at(is[1])}; }
inline void assign(Gradients& g, const std::array<int64_t, 3>& is) { g = {at(is[0]), at(is[1]), at(is[2])}; }
inline void assign(Interval& i, const std::array<int64_t, 2>& is) { i = {is[0], is[1]}; }
inline void assign(GatheredBlocks& g, const std::array<int64_t, 3>& is) { g = {at(is[0]), at(is[1]), int32_t(is[2])}; }

} // namespace sparsenet

namespace pybind11::detail {

// What the structs have in common: read from a tuple, never handed back to Python.
template <typename T, size_t N> struct struct_from_tuple {
  T value;
  static constexpr auto name = const_name("tuple");
  template <typename> using cast_op_type = const T&;
  operator const T&() const { return value; }
  bool load(handle source, bool) {
    std::array<int64_t, N> is{};
    if (!sparsenet::integers(source, is)) return false;
    sparsenet::assign(value, is);
    return true;
  }
};

template <> struct type_caster<sparsenet::Matrix> : struct_from_tuple<sparsenet::Matrix, 4> {};
template <> struct type_caster<sparsenet::LinearCall> : struct_from_tuple<sparsenet::LinearCall, 3> {};
template <> struct type_caster<sparsenet::GradientCall> : struct_from_tuple<sparsenet::GradientCall, 3> {};
template <> struct type_caster<sparsenet::Weight> : struct_from_tuple<sparsenet::Weight, 2> {};
template <> struct type_caster<sparsenet::Outputs> : struct_from_tuple<sparsenet::Outputs, 2> {};
template <> struct type_caster<sparsenet::Gradients> : struct_from_tuple<sparsenet::Gradients, 3> {};
template <> struct type_caster<sparsenet::Interval> : struct_from_tuple<sparsenet::Interval, 2> {};
template <> struct type_caster<sparsenet::GatheredBlocks> : struct_from_tuple<sparsenet::GatheredBlocks, 3> {};

template <> struct type_caster<sparsenet::Upstream> {
  sparsenet::Upstream value;
  static constexpr auto name = const_name("tuple");
  template <typename> using cast_op_type = const sparsenet::Upstream&;
  operator const sparsenet::Upstream&() const { return value; }
  bool load(handle source, bool convert) {
    if (!PyTuple_CheckExact(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 2) return false;
    type_caster<sparsenet::Matrix> grad_y;
    if (!grad_y.load(PyTuple_GET_ITEM(source.ptr(), 0), convert)) return false;
    PyObject* saved = PyTuple_GET_ITEM(source.ptr(), 1);
    if (!PyLong_CheckExact(saved)) return false;
    value = {grad_y, PyLong_AsVoidPtr(saved)};
    return true;
  }
};

} // namespace pybind11::detail
