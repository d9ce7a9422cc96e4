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

// The factor on grad_y: of the result y for relu, of the pre-activation z for gelu and silu.
template <typename A>
SPARSENET_DEVICE A activation_derivative(A saved, Activation activation) {
  switch (activation) {
  case Activation::relu:
    return saved > A(0) ? A(1) : A(0);
  case Activation::gelu:
    return A(0.5) * (A(1) + error_function(saved * A(0.70710678118654752440))) +
           saved * A(0.39894228040143267794) * exponential(A(-0.5) * saved * saved);
  case Activation::silu: {
    const A sigmoid = divide(A(1), A(1) + exponential(-saved));
    return sigmoid * (A(1) + saved * (A(1) - sigmoid));
  }
  default:
    return A(1);
  }
}

} // namespace sparsenet::cuda
