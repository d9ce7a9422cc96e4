// Numbers known at run time become constants: dtype, block size, width of a small batch, activation, and how operands
// are held. These are the only places where one of them is compared with what kernels are compiled for.
#pragma once

#include "../block_sizes.h"
#include "kernel_table.h"
#include "pack.h"

namespace sparsenet::cpu::SPARSENET_ISA {
namespace {

// One op's row of the kernel table: find.operator()<S>() is its kernel for elements of type S. Null: not served here.
template <class Op, class Find> consteval Row<Op> by_dtype(const Find& find) {
  Row<Op> row = {};
  row.by_dtype[int(DType::float32)] = find.template operator()<float>();
  row.by_dtype[int(DType::bfloat16)] = find.template operator()<BFloat16>();
#if defined(SPARSENET_PORTABLE)
  row.by_dtype[int(DType::float16)] = find.template operator()<Half>();
  row.by_dtype[int(DType::float64)] = find.template operator()<double>();
#endif
  return row;
}

// call<P>() with how operands of type S are held: as pairs where the set multiplies pairs of bfloat16 and `paired` says
// that the op's blocks are wide enough for it, one by one otherwise.
template <typename S, class Call> SPARSENET_INLINE void with_operands(bool paired, const Call& call) {
  if constexpr (kHasPairs<S>)
    if (paired) return call.template operator()<Pair>();
  call.template operator()<Single<Compute<S>>>();
}

// call<N>() for the N of the list that `n` equals; the last one where it equals none.
template <int kFirst, int... kRest, class Call> SPARSENET_INLINE auto with_one_of(int64_t n, const Call& call) {
  if constexpr (sizeof...(kRest) == 0) {
    return call.template operator()<kFirst>();
  } else {
    return n == kFirst ? call.template operator()<kFirst>() : with_one_of<kRest...>(n, call);
  }
}

// call<B>() for the block size b, which lies in [kSmallest, kLargest].
template <int kSmallest, int kLargest, int kIndex = 0, class Call>
SPARSENET_INLINE auto with_block_size(int64_t b, const Call& call) {
  constexpr int size = kBlockSizes[kIndex];
  static_assert(kSmallest <= kLargest && kLargest <= kBlockSizes[kNumBlockSizes - 1], "no such block size");
  if constexpr (size < kSmallest) {
    return with_block_size<kSmallest, kLargest, kIndex + 1>(b, call);
  } else if constexpr (kIndex + 1 == kNumBlockSizes || kBlockSizes[kIndex + 1] > kLargest) {
    return call.template operator()<size>();
  } else {
    return b == size ? call.template operator()<size>() : with_block_size<kSmallest, kLargest, kIndex + 1>(b, call);
  }
}

// call<M>() for the rows of a chunk of a small batch, padded to a power of two.
template <class Call> SPARSENET_INLINE auto with_chunk_width(int64_t width, const Call& call) {
  return with_one_of<1, 2, 4, 8, 16>(width, call);
}

// call<A>() for the activation.
template <class Call> SPARSENET_INLINE void with_activation(Activation activation, const Call& call) {
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
