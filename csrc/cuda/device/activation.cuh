// The activations and their derivatives, in the accumulator's type.
#pragma once

#include "../../types.h"
#include "intrinsics.cuh"

namespace sparsenet::cuda {

template <typename A>
SPARSENET_DEVICE A activate(A z, Activation activation) {
  switch (activation) {
  case Activation::relu:
    return z < A(0) ? A(0) : z; // NaN stays NaN
  case Activation::gelu:
    return A(0.5) * z * (A(1) + error_function(z * A(0.70710678118654752440)));
  case Activation::silu:
    return divide(z, A(1) + exponential(-z));
  default:
    return z;
  }
}

// grad_y * activation'(z); `saved` is the result y for relu (its sign decides) and the pre-activation z for gelu and
// silu.
template <typename A>
SPARSENET_DEVICE A activation_gradient(A grad_y, A saved, Activation activation) {
  switch (activation) {
  case Activation::relu:
    return saved <= A(0) ? A(0) : grad_y; // chosen, not multiplied: 0 where grad_y is infinite or NaN, too
  case Activation::gelu:
    return grad_y * (A(0.5) * (A(1) + error_function(saved * A(0.70710678118654752440))) +
                     saved * A(0.39894228040143267794) * exponential(A(-0.5) * saved * saved));
  case Activation::silu: {
    const A sigmoid = divide(A(1), A(1) + exponential(-saved));
    return grad_y * (sigmoid * (A(1) + saved * (A(1) - sigmoid)));
  }
  default:
    return grad_y;
  }
}

} // namespace sparsenet::cuda
