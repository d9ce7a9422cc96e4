// What forward and grad_input have in common: out[M, outputs] = source[M, inputs] times the blocks, walked along the
// outputs, block rows for forward and block columns for grad_input.
#pragma once

#include "pack.h"

namespace sparsenet::cpu::SPARSENET_ISA {
namespace {

template <typename W> struct Product {
  const W* values;
  const int32_t* crow;     // [out_blocks + 1]
  const int32_t* features; // [num_blocks] input block of each entry
  const int32_t* blocks;   // [num_blocks] its place in values; null: in order
  int64_t num_blocks, out_blocks, in_blocks, outputs, inputs;
};

// The pattern as it is walked: block rows for forward, block columns (transposed) for grad_input.
template <typename W>
Product<W> product_of(const PatternView& p, bool transposed, const W* values, bool values_in_walk_order) {
  if (!transposed)
    return {values, p.crow, p.col, nullptr, p.num_blocks, p.block_rows(), p.block_cols(), p.rows, p.cols};
  return {values,         p.t_crow, p.t_row, values_in_walk_order ? nullptr : p.t_block, p.num_blocks, p.block_cols(),
          p.block_rows(), p.cols,   p.rows};
}

// The block row at which part `part` of `parts` begins, a multiple of `group`, so that the parts hold about equally
// many blocks.
template <typename W> int64_t part_begin(const Product<W>& op, int64_t group, int64_t part, int64_t parts) {
  if (part >= parts) return op.out_blocks;
  const int64_t goal = part * (op.num_blocks * 8 + op.out_blocks) / parts;
  int64_t low = 0, high = op.out_blocks; // first row whose cost before it reaches the goal
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (int64_t(op.crow[middle]) * 8 + middle < goal) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return min_of(ceil_div(low, group) * group, op.out_blocks);
}

template <typename S> struct Epilogue {
  const S* bias; // [outputs] or null
  S* y;
  int64_t y_stride;
  S* pre_activation; // null: not wanted
  int64_t pre_stride;
};

template <typename S> Rows<S> rows_of(const Matrix& x) { return {static_cast<const S*>(x.data), x.stride, nullptr, 0}; }

template <typename S> Rows<S> grad_z_rows(const LinearBackward& op) {
  return {static_cast<const S*>(op.grad_y.data), op.grad_y.stride, static_cast<const S*>(op.saved.data),
          op.saved.stride};
}

template <typename S> Epilogue<S> forward_epilogue(const LinearForward& op) {
  return {static_cast<const S*>(op.bias), static_cast<S*>(op.y.data), op.y.stride,
          static_cast<S*>(op.pre_activation.data), op.pre_activation.stride};
}

template <typename S> Epilogue<S> grad_input_epilogue(const LinearBackward& op) {
  return {nullptr, static_cast<S*>(op.grad_x.data), op.grad_x.stride, nullptr, 0};
}

// call<A>() with the activation as a constant.
template <class Call> void with_activation(Activation activation, const Call& call) {
  switch (activation) {
  case Activation::none:
    return call.template operator()<Activation::none>();
  case Activation::relu:
    return call.template operator()<Activation::relu>();
  case Activation::gelu:
    return call.template operator()<Activation::gelu>();
  case Activation::silu:
    return call.template operator()<Activation::silu>();
  }
}

} // namespace
} // namespace sparsenet::cpu::SPARSENET_ISA
