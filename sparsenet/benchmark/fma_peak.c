// Multiply-adds per second that one core sustains from registers: the roof of every matrix kernel here.
// Built at run time by sparsenet.benchmark.machine with the vector width of the instruction set in use (VECTOR_BYTES).
#if defined(DOT_BFLOAT16)
#include <immintrin.h>
#endif

enum { kChains = 12 }; // more independent sums than latency times throughput of any core

typedef float Vector __attribute__((vector_size(VECTOR_BYTES)));

// Operations (a multiply and an add are two) done by `rounds` rounds; *keep stops the compiler from leaving them out.
double fma_float32(long rounds, float* keep) {
  Vector sums[kChains], a, b;
  for (int lane = 0; lane < (int)(VECTOR_BYTES / sizeof(float)); ++lane) a[lane] = 0.999f, b[lane] = 1e-3f * lane;
  for (int i = 0; i < kChains; ++i) sums[i] = b * (float)i;
  for (long round = 0; round < rounds; ++round)
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sums[i] = sums[i] * a + b;
  for (int i = 1; i < kChains; ++i) sums[0] += sums[i];
  *keep = sums[0][0];
  return 2.0 * rounds * kChains * (VECTOR_BYTES / sizeof(float));
}

#if defined(DOT_BFLOAT16)
double fma_bfloat16(long rounds, float* keep) {
  __m512 sums[kChains];
  const __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5f), _mm512_set1_ps(0.25f));
  for (int i = 0; i < kChains; ++i) sums[i] = _mm512_set1_ps(1e-3f * i);
  for (long round = 0; round < rounds; ++round)
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], a, a);
  for (int i = 1; i < kChains; ++i) sums[0] = _mm512_add_ps(sums[0], sums[i]);
  *keep = _mm512_reduce_add_ps(sums[0]);
  return 4.0 * rounds * kChains * (64 / sizeof(float)); // pairs of products
}
#endif
