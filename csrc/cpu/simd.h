// One vector vocabulary for every instruction set. Each op's source is compiled once per set, with its own flags and
// its own namespace (SPARSENET_ISA), so that nothing compiled for AVX-512 can be linked into the portable path. For the
// same reason these sources use no std:: templates: an inline function of the standard library, compiled here with
// AVX-512 flags, would be a weak symbol that the linker may pick for everybody.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
  #include <immintrin.h>
#endif

#include "../types.h"

#define SPARSENET_INLINE inline __attribute__((always_inline))

namespace sparsenet::cpu::SPARSENET_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kRegisters = 16;
#else
constexpr int kVectorBytes = 16, kRegisters = 16;
#endif

constexpr int64_t kLineBytes = 64; // of a cache

SPARSENET_INLINE constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
SPARSENET_INLINE constexpr int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
SPARSENET_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T> constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <typename T> struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes), may_alias));
  typedef T unaligned __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));
};
template <typename T> using Vec = typename VectorOf<T>::type;

struct BFloat16 {
  uint16_t bits;
};
using Half = _Float16;

template <typename T> SPARSENET_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(p);
}
template <typename T> SPARSENET_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(p) = v;
}

template <typename T> SPARSENET_INLINE Vec<T> broadcast(T x) {
  Vec<T> v;
  for (int i = 0; i < kLanes<T>; ++i) v[i] = x;
  return v;
}
#if defined(__AVX512F__)
template <> SPARSENET_INLINE Vec<float> broadcast(float x) { return (Vec<float>)_mm512_set1_ps(x); }
#elif defined(__AVX2__)
template <> SPARSENET_INLINE Vec<float> broadcast(float x) { return (Vec<float>)_mm256_set1_ps(x); }
#endif

SPARSENET_INLINE float sum_lanes(Vec<float> v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float s = v[0];
  for (int i = 1; i < kLanes<float>; ++i) s += v[i];
  return s;
#endif
}
SPARSENET_INLINE double sum_lanes(Vec<double> v) {
  double s = v[0];
  for (int i = 1; i < kLanes<double>; ++i) s += v[i];
  return s;
}

// --- storage types to and from the type that is computed in (float for everything but float64) -----------------------

template <typename S> struct ComputeOf {
  using type = float;
};
template <> struct ComputeOf<double> {
  using type = double;
};
template <typename S> using Compute = typename ComputeOf<S>::type;

SPARSENET_INLINE float widen(float x) { return x; }
SPARSENET_INLINE double widen(double x) { return x; }
SPARSENET_INLINE float widen(Half x) { return float(x); }
SPARSENET_INLINE float widen(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

SPARSENET_INLINE void narrow(float x, float* out) { *out = x; }
SPARSENET_INLINE void narrow(double x, double* out) { *out = x; }
SPARSENET_INLINE void narrow(float x, Half* out) { *out = Half(x); }
SPARSENET_INLINE void narrow(float x, BFloat16* out) { // round to nearest even; NaN stays NaN
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}

typedef uint16_t HalfVector __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));

SPARSENET_INLINE Vec<float> load_wide(const float* p) { return load(p); }
SPARSENET_INLINE Vec<double> load_wide(const double* p) { return load(p); }
SPARSENET_INLINE Vec<float> load_wide(const Half* p) {
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = float(p[i]);
  return v;
}
SPARSENET_INLINE Vec<float> load_wide(const BFloat16* p) {
  const auto raw = *reinterpret_cast<const HalfVector*>(p);
  return (Vec<float>)(__builtin_convertvector(raw, Vec<uint32_t>) << 16);
}

SPARSENET_INLINE void store_narrow(float* p, Vec<float> v) { store(p, v); }
SPARSENET_INLINE void store_narrow(double* p, Vec<double> v) { store(p, v); }
SPARSENET_INLINE void store_narrow(Half* p, Vec<float> v) {
  for (int i = 0; i < kLanes<float>; ++i) p[i] = Half(v[i]);
}
// In the upper half of each lane: v rounded to nearest even; NaN stays NaN.
SPARSENET_INLINE Vec<uint32_t> round_upper(Vec<float> v) {
  const auto bits = (Vec<uint32_t>)v;
  return v != v ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
}
SPARSENET_INLINE HalfVector round_to_bfloat16(Vec<float> v) {
  return __builtin_convertvector(round_upper(v) >> 16, HalfVector);
}
// Two bfloat16 a lane: `even` in the lower half, where memory begins, `odd` in the upper.
SPARSENET_INLINE Vec<uint32_t> pairs_of(Vec<float> even, Vec<float> odd) {
  return (round_upper(even) >> 16) | (round_upper(odd) & 0xffff0000u);
}
SPARSENET_INLINE void store_narrow(BFloat16* p, Vec<float> v) {
  *reinterpret_cast<HalfVector*>(p) = round_to_bfloat16(v);
}

// The first `count` lanes only; the rest are zero.
template <typename S> SPARSENET_INLINE Vec<Compute<S>> load_wide(const S* p, int64_t count) {
  constexpr int lanes = kLanes<Compute<S>>;
  if (count >= lanes) return load_wide(p);
  Vec<Compute<S>> v = {};
  for (int i = 0; i < lanes; ++i)
    if (i < count) v[i] = widen(p[i]);
  return v;
}
template <typename S> SPARSENET_INLINE void store_narrow(S* p, Vec<Compute<S>> v, int64_t count) {
  constexpr int lanes = kLanes<Compute<S>>;
  if (count >= lanes) return store_narrow(p, v);
  for (int i = 0; i < lanes; ++i)
    if (i < count) narrow(v[i], p + i);
}

// kLanes<float> bfloat16, each in the lower half of a lane.
SPARSENET_INLINE Vec<uint32_t> load_halves(const BFloat16* p) {
  return __builtin_convertvector(*reinterpret_cast<const HalfVector*>(p), Vec<uint32_t>);
}
// The first kCount of them, and zeros.
template <int kCount> SPARSENET_INLINE Vec<uint32_t> first_halves(const BFloat16* p) {
  if constexpr (kCount >= kLanes<float>) return load_halves(p);
  Vec<uint32_t> v = {};
  for (int i = 0; i < kCount && i < kLanes<float>; ++i) v[i] = p[i].bits;
  return v;
}

// --- transposing a square of kLanes x kLanes, and adding up its rows ----------------------------------------------

template <typename T> SPARSENET_INLINE void transpose_in_memory(Vec<T>* r) {
  constexpr int n = kLanes<T>;
  T square[n][n];
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j) square[j][i] = r[i][j];
  for (int i = 0; i < n; ++i) r[i] = load(square[i]);
}
SPARSENET_INLINE void transpose(Vec<double>* rows) { transpose_in_memory<double>(rows); }
#if defined(__AVX512F__)
SPARSENET_INLINE void transpose(Vec<float>* rows) {
  __m512 r[16], t[16];
  #pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = (__m512)rows[i];
  #pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  #pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = (__m512)_mm512_unpacklo_pd((__m512d)t[i], (__m512d)t[i + 2]);
    r[i + 1] = (__m512)_mm512_unpackhi_pd((__m512d)t[i], (__m512d)t[i + 2]);
    r[i + 2] = (__m512)_mm512_unpacklo_pd((__m512d)t[i + 1], (__m512d)t[i + 3]);
    r[i + 3] = (__m512)_mm512_unpackhi_pd((__m512d)t[i + 1], (__m512d)t[i + 3]);
  }
  #pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
  #pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    rows[i] = (Vec<float>)_mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    rows[i + 8] = (Vec<float>)_mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
  }
}
#elif defined(__AVX2__)
// Halves are exchanged by extracting and inserting: _mm256_permute2f128_ps takes eight operations on AMD's Zen 1.
SPARSENET_INLINE void transpose(Vec<float>* rows) {
  __m256 r[8], t[8];
  #pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256 a = (__m256)rows[i], b = (__m256)rows[i + 4];
    r[i] = _mm256_insertf128_ps(a, _mm256_castps256_ps128(b), 1);
    r[i + 4] = _mm256_insertf128_ps(b, _mm256_extractf128_ps(a, 1), 0);
  }
  #pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  #pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    rows[i] = (Vec<float>)_mm256_unpacklo_pd((__m256d)t[i], (__m256d)t[i + 2]);
    rows[i + 1] = (Vec<float>)_mm256_unpackhi_pd((__m256d)t[i], (__m256d)t[i + 2]);
    rows[i + 2] = (Vec<float>)_mm256_unpacklo_pd((__m256d)t[i + 1], (__m256d)t[i + 3]);
    rows[i + 3] = (Vec<float>)_mm256_unpackhi_pd((__m256d)t[i + 1], (__m256d)t[i + 3]);
  }
}
#else
SPARSENET_INLINE void transpose(Vec<float>* rows) { transpose_in_memory<float>(rows); }
#endif
SPARSENET_INLINE void transpose(Vec<uint32_t>* rows) { transpose(reinterpret_cast<Vec<float>*>(rows)); }

// Lane i of sum_each: the sum of the lanes of rows[i]. The rows are used up.
template <typename T> SPARSENET_INLINE Vec<T> sum_transposed(Vec<T>* rows) {
  transpose(rows);
  Vec<T> sums = rows[0];
#pragma GCC unroll 16
  for (int i = 1; i < kLanes<T>; ++i) sums += rows[i];
  return sums;
}
SPARSENET_INLINE Vec<double> sum_each(Vec<double>* rows) { return sum_transposed<double>(rows); }
#if defined(__AVX2__) && !defined(__AVX512F__)
// Halves are added first: half the shuffles, and none across halves, which are slow on AMD's Zen 1.
SPARSENET_INLINE Vec<float> sum_each(Vec<float>* rows) {
  __m128 half[8], sums[2];
  #pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    half[i] = _mm_add_ps(_mm256_castps256_ps128((__m256)rows[i]), _mm256_extractf128_ps((__m256)rows[i], 1));
  #pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m128* const h = half + 4 * i;
    const __m128 low = _mm_add_ps(_mm_unpacklo_ps(h[0], h[1]), _mm_unpackhi_ps(h[0], h[1])); // of h0, h1, h0, h1
    const __m128 high = _mm_add_ps(_mm_unpacklo_ps(h[2], h[3]), _mm_unpackhi_ps(h[2], h[3]));
    sums[i] = _mm_add_ps(_mm_movelh_ps(low, high), _mm_movehl_ps(high, low));
  }
  return (Vec<float>)_mm256_set_m128(sums[1], sums[0]);
}
#else
SPARSENET_INLINE Vec<float> sum_each(Vec<float>* rows) { return sum_transposed<float>(rows); }
#endif

} // namespace
} // namespace sparsenet::cpu::SPARSENET_ISA
