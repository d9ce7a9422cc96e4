// Activations and their derivatives on vectors. float: polynomial exp and erfc, a few ulp; double: the C library.
#pragma once

#include <math.h>

#include "simd.h"

namespace sparsenet::cpu::SPARSENET_ISA {
namespace {

SPARSENET_INLINE Vec<float> select(Vec<int32_t> mask, Vec<float> a, Vec<float> b) {
  return (Vec<float>)((mask & (Vec<int32_t>)a) | (~mask & (Vec<int32_t>)b));
}

// exp by 2^n * e^r with |r| <= ln2 / 2 and a degree-6 Taylor-like polynomial; inputs are clamped to [-87.3, 88].
SPARSENET_INLINE Vec<float> exp_of(Vec<float> x) {
  const Vec<float> low = broadcast(-87.3f), high = broadcast(88.0f);
  x = select(x < low, low, x); // a comparison with NaN is false: NaN stays
  x = select(x > high, high, x);
  const Vec<float> magic = broadcast(12582912.0f); // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> shifted = x * 1.44269504f + magic;
  const Vec<float> n = shifted - magic;
  Vec<float> r = x - n * 0.693145751953125f;
  r = r - n * 1.42860677e-6f;
  Vec<float> p = r * 1.3888889e-3f + 8.3333333e-3f;
  p = p * r + 4.1666668e-2f;
  p = p * r + 0.16666667f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Vec<int32_t> exponent = ((Vec<int32_t>)shifted - (Vec<int32_t>)magic) << 23;
  return (Vec<float>)((Vec<int32_t>)p + exponent);
}

// Upper tail of the normal distribution, 1 - Phi(|x|), as polynomial(t) * exp(-x^2 / 2) with t = 1 / (1 + p |x|/sqrt 2)
// (Abramowitz & Stegun 1964, 7.1.26: absolute error of erf at most 1.5e-7). Also returns exp(-x^2 / 2).
SPARSENET_INLINE Vec<float> normal_tail(Vec<float> x, Vec<float>* gaussian) {
  const Vec<float> magnitude = (Vec<float>)((Vec<int32_t>)x & 0x7fffffff);
  const Vec<float> z = magnitude * 0.70710678f;
  const Vec<float> t = 1.0f / (z * 0.3275911f + 1.0f);
  Vec<float> p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  *gaussian = exp_of(-z * z);
  return 0.5f * p * t * *gaussian;
}

SPARSENET_INLINE Vec<float> normal_cdf(Vec<float> x, Vec<float>* gaussian) {
  const Vec<float> tail = normal_tail(x, gaussian);
  return select(x < 0.0f, tail, 1.0f - tail);
}

template <Activation A> SPARSENET_INLINE Vec<float> activate(Vec<float> x) {
  if constexpr (A == Activation::relu) return select(x < 0.0f, broadcast(0.0f), x); // NaN stays NaN, as in torch
  if constexpr (A == Activation::gelu) {
    Vec<float> gaussian;
    return x * normal_cdf(x, &gaussian);
  }
  if constexpr (A == Activation::silu) return x / (1.0f + exp_of(-x));
  return x;
}

// grad * activation'(z); `saved` is y for relu (its sign decides) and z for gelu and silu.
template <Activation A> SPARSENET_INLINE Vec<float> activation_gradient(Vec<float> grad, Vec<float> saved) {
  if constexpr (A == Activation::relu) return select(saved <= 0.0f, broadcast(0.0f), grad);
  if constexpr (A == Activation::gelu) {
    Vec<float> gaussian;
    const Vec<float> cdf = normal_cdf(saved, &gaussian);
    return grad * (cdf + saved * gaussian * 0.39894228f);
  }
  if constexpr (A == Activation::silu) {
    const Vec<float> s = 1.0f / (1.0f + exp_of(-saved));
    return grad * (s * (1.0f + saved * (1.0f - s)));
  }
  return grad;
}

template <Activation A> double activate(double x) {
  if constexpr (A == Activation::relu) return x < 0 ? 0.0 : x;
  if constexpr (A == Activation::gelu) return 0.5 * x * erfc(-x * M_SQRT1_2);
  if constexpr (A == Activation::silu) return x / (1.0 + exp(-x));
  return x;
}
template <Activation A> double activation_gradient(double grad, double saved) {
  if constexpr (A == Activation::relu) return saved <= 0 ? 0.0 : grad;
  if constexpr (A == Activation::gelu)
    return grad * (0.5 * erfc(-saved * M_SQRT1_2) + saved * exp(-0.5 * saved * saved) * 0.3989422804014327);
  if constexpr (A == Activation::silu) {
    const double s = 1.0 / (1.0 + exp(-saved));
    return grad * (s * (1.0 + saved * (1.0 - s)));
  }
  return grad;
}
template <Activation A> SPARSENET_INLINE Vec<double> activate(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = activate<A>(double(x[i]));
  return x;
}
template <Activation A> SPARSENET_INLINE Vec<double> activation_gradient(Vec<double> grad, Vec<double> saved) {
  for (int i = 0; i < kLanes<double>; ++i) grad[i] = activation_gradient<A>(double(grad[i]), double(saved[i]));
  return grad;
}

} // namespace
} // namespace sparsenet::cpu::SPARSENET_ISA
