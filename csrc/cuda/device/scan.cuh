// Exclusive sums over the threads of a CTA: warps by shuffles, then their totals in warp order.
#pragma once

#include "intrinsics.cuh"

namespace sparsenet::cuda {

struct ScanConfig {
  static constexpr int kThreads = 512;
  static constexpr int kWarps = kThreads / 32;
};

// Exclusive sum over the threads of a CTA; `scratch` holds kWarps + 1 values, the last one is the total of all.
template <int kWarps>
SPARSENET_DEVICE int32_t block_exclusive_scan(int32_t value, Shared<int32_t> scratch, int32_t& total) {
  int32_t inclusive = value;
  SPARSENET_UNROLL
  for (int distance = 1; distance < 32; distance *= 2) {
    const int32_t below = shuffle_up(inclusive, distance);
    if (lane_index() >= distance) inclusive += below;
  }
  if (lane_index() == 31) scratch[warp_index()] = inclusive;
  sync_block();
  if (thread_index() == 0) {
    int32_t sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) {
      const int32_t warp_total = scratch[warp];
      scratch[warp] = sum;
      sum += warp_total;
    }
    scratch[kWarps] = sum;
  }
  sync_block();
  const int32_t result = inclusive - value + scratch[warp_index()];
  total = scratch[kWarps];
  sync_block(); // scratch may be used again
  return result;
}

} // namespace sparsenet::cuda
