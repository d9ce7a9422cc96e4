// The device vocabulary of every kernel: thread indices, barriers, shuffles, shared memory, asynchronous copies,
// matrix instructions, atomics, 16-bit conversions. This is the only file with inline assembly.
//
// It has a host twin (tests/cuda/emulator/intrinsics_host.h) with the same names and the same meaning, in which every
// access is checked. Kernels therefore keep four rules:
//   - shared memory is reached only through Shared<T> handles made by shared_array<T>(byte_offset);
//   - global memory is read and written only through load_global / store_global / async copies / atomics;
//   - warp-wide operations are called by all 32 lanes;
//   - no CTA waits for another CTA of the same launch.
#pragma once

#include <cstdint>

#ifdef SPARSENET_EMULATOR
  #include "emulator/intrinsics_host.h"
#else

  #include <cuda_bf16.h>
  #include <cuda_fp16.h>
  #include <cuda_runtime.h>

  #define SPARSENET_DEVICE __device__ __forceinline__
  #define SPARSENET_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
  #define SPARSENET_UNROLL _Pragma("unroll")
  #define SPARSENET_UNROLL_4 _Pragma("unroll 4")
  #define SPARSENET_NO_UNROLL _Pragma("unroll 1")

namespace sparsenet::cuda {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

// Indices -------------------------------------------------------------------------------------------------------
SPARSENET_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
SPARSENET_DEVICE int lane_index() { return static_cast<int>(threadIdx.x & 31u); }
SPARSENET_DEVICE int warp_index() { return static_cast<int>(threadIdx.x >> 5); }
SPARSENET_DEVICE int64_t block_index() { return static_cast<int64_t>(blockIdx.x); }

// Barriers and warp-wide exchange ----------------------------------------------------------------------------------
SPARSENET_DEVICE void sync_block() { __syncthreads(); }
SPARSENET_DEVICE void sync_warp() { __syncwarp(); }

template <typename T>
SPARSENET_DEVICE T shuffle_xor(T value, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}
template <typename T>
SPARSENET_DEVICE T shuffle_up(T value, int delta) {
  return __shfl_up_sync(0xffffffffu, value, static_cast<unsigned>(delta));
}
template <typename T>
SPARSENET_DEVICE T shuffle_from(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
SPARSENET_DEVICE uint32_t ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }

// Memory --------------------------------------------------------------------------------------------------------
template <typename T>
using Shared = T*;

extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];

template <typename T>
SPARSENET_DEVICE Shared<T> shared_array(int64_t byte_offset) {
  return reinterpret_cast<T*>(dynamic_shared_memory + byte_offset);
}
template <typename U, typename T>
SPARSENET_DEVICE Shared<U> shared_cast(Shared<T> pointer) {
  return reinterpret_cast<U*>(pointer);
}
template <typename T>
SPARSENET_DEVICE uint32_t shared_address(Shared<T> pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

template <typename T>
SPARSENET_DEVICE T load_global(const T* pointer) {
  return *pointer;
}
template <typename T>
SPARSENET_DEVICE void store_global(T* pointer, T value) {
  *pointer = value;
}

SPARSENET_DEVICE void atomic_min_global(unsigned long long* pointer, unsigned long long value) {
  atomicMin(pointer, value);
}

// Asynchronous copy of 16 bytes from global to shared memory (cp.async, sm_80); the bytes past `valid_bytes` (0..16)
// become zero and their source is not read. Both addresses are 16-byte aligned. The data may be read by the issuing
// thread after async_wait, by others after a barrier that follows it.
template <typename T>
SPARSENET_DEVICE void async_copy_16(Shared<T> destination, const T* source, int valid_bytes) {
  #if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(destination)), "l"(source),
               "r"(valid_bytes)
               : "memory");
  #endif
}
SPARSENET_DEVICE void async_commit() {
  #if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;\n" ::: "memory");
  #endif
}
template <int kPendingGroups>
SPARSENET_DEVICE void async_wait() {
  #if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPendingGroups) : "memory");
  #endif
}

// Matrix instructions ---------------------------------------------------------------------------------------------
// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8 (16-byte aligned) and
// receives in r[i] elements 2 (l % 4), 2 (l % 4) + 1 of row l / 4 of matrix i. _trans: of the transposed matrices.
template <typename T>
SPARSENET_DEVICE void load_matrix_x4(uint32_t (&r)[4], Shared<T> row) {
  static_assert(sizeof(T) == 2, "ldmatrix moves 16-bit elements");
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
template <typename T>
SPARSENET_DEVICE void load_matrix_x4_trans(uint32_t (&r)[4], Shared<T> row) {
  static_assert(sizeof(T) == 2, "ldmatrix moves 16-bit elements");
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d[16x8] += a[16x16] b[16x8], fp32 accumulators. Lane l, g = l / 4, q = l % 4 holds
//   a: (g, 2q..2q+1) (g+8, 2q..) (g, 2q+8..) (g+8, 2q+8..)   b: (2q..2q+1, g) (2q+8.., g)
//   d: (g, 2q) (g, 2q+1) (g+8, 2q) (g+8, 2q+1)
template <typename T>
SPARSENET_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
SPARSENET_DEVICE void mma_m16n8k16<bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  #if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
               "{%0,%1,%2,%3};\n"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  #endif
}
template <>
SPARSENET_DEVICE void mma_m16n8k16<float16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  #if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
               "{%0,%1,%2,%3};\n"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  #endif
}

// d[16x8] += a[16x8] b[8x8] in tf32 (operands rounded to 10 mantissa bits by round_to_tf32), fp32 accumulators. Lane l:
//   a: (g, q) (g+8, q) (g, q+4) (g+8, q+4)   b: (q, g) (q+4, g)   d as above
SPARSENET_DEVICE uint32_t round_to_tf32(float value) {
  uint32_t bits = 0;
  #if __CUDA_ARCH__ >= 800
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(value));
  #endif
  return bits;
}
SPARSENET_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  #if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
               "{%0,%1,%2,%3};\n"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  #endif
}

// Conversions and functions ------------------------------------------------------------------------------------------
SPARSENET_DEVICE float to_accumulator(float value) { return value; }
SPARSENET_DEVICE double to_accumulator(double value) { return value; }
SPARSENET_DEVICE float to_accumulator(bfloat16 value) { return __bfloat162float(value); }
SPARSENET_DEVICE float to_accumulator(float16 value) { return __half2float(value); }

template <typename T, typename Accumulator>
SPARSENET_DEVICE T from_accumulator(Accumulator value) {
  return static_cast<T>(value);
}
template <>
SPARSENET_DEVICE bfloat16 from_accumulator<bfloat16, float>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
SPARSENET_DEVICE float16 from_accumulator<float16, float>(float value) {
  return __float2half_rn(value);
}

SPARSENET_DEVICE uint32_t bits_of(float value) { return __float_as_uint(value); }
SPARSENET_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

SPARSENET_DEVICE float exponential(float value) { return expf(value); }
SPARSENET_DEVICE double exponential(double value) { return exp(value); }
// Within 2 units in the last place, and without the subroutine call whose saved registers would count as spills.
SPARSENET_DEVICE float divide(float a, float b) { return __fdividef(a, b); }
SPARSENET_DEVICE double divide(double a, double b) { return a / b; }
SPARSENET_DEVICE float error_function(float value) { return erff(value); }
SPARSENET_DEVICE double error_function(double value) { return erf(value); }

} // namespace sparsenet::cuda

#endif // SPARSENET_EMULATOR
