// Element types: what a type is summed in, and the switch from a dtype code to a type. And what kernels of a thread per
// element share: their launch, the search in sorted indices, the widest word.
#pragma once

#include "intrinsics.cuh"
#include "../host/launch.h"

namespace sparsenet::cuda {

template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

// Calls function(T{}) with the element type of dtype.
template <typename Function>
void with_dtype(DType dtype, const Function& function) {
  if (dtype == DType::float32 || dtype == kTf32) return function(float{});
  if (dtype == DType::float64) return function(double{});
  if (dtype == DType::bfloat16) return function(bfloat16{});
  return function(float16{});
}

struct ElementConfig {
  static constexpr int kThreads = 256;
};
SPARSENET_DEVICE int64_t element_index() { return block_index() * ElementConfig::kThreads + thread_index(); }

template <typename Params>
void launch_elements(const char* name, void (*kernel)(Params), int64_t elements, Stream stream, const Params& params) {
  launch(name, kernel, {.ctas = ceil_div(elements, ElementConfig::kThreads), .threads = ElementConfig::kThreads},
         stream, params);
}

// First position in sorted[0..count) whose value is >= bound.
template <typename T>
SPARSENET_DEVICE int64_t lower_bound(const T* sorted, int64_t count, T bound) {
  int64_t begin = 0, end = count;
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (load_global(sorted + middle) < bound)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

struct alignas(16) Word16 {
  uint32_t words[4];
};

} // namespace sparsenet::cuda
