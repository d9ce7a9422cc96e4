// What kernels of a thread per element share: their launch, the search in sorted indices, the widest word.
#pragma once

#include "intrinsics.cuh"
#include "../host/launch.h"

namespace sparsenet::cuda {

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
