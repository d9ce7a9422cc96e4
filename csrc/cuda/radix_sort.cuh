// Stable radix sort of 64-bit keys with 32-bit payloads, and the block-wide scan it rests on. It orders places of a
// pattern, transposes an index and ranks scores; ties keep their order, so every result is by lower index.
//
// 8 bits a pass, three kernels a pass:
//   count    a CTA per 4096 elements: its 256 digit counts -> counts[digit][tile]
//   scan     one CTA: exclusive sums over counts, which is each (digit, tile)'s first output position
//   scatter  a CTA per tile, 256 elements a round: rank among equal digits by warp ballots, then across warps by digit
// Bytes per element and pass: 8 read to count, 12 to move, 12 written. Nothing here has been timed on hardware yet.
#pragma once

#include <utility>

#include "device/intrinsics.cuh"
#include "host/launch.h"

namespace sparsenet::cuda {

struct RadixConfig {
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kRounds = 16;
  static constexpr int kTile = kThreads * kRounds;
  static constexpr int kDigitBits = 8;
  static constexpr int kDigits = 1 << kDigitBits;
  static_assert(kDigits == kThreads, "in the scatter kernel a thread owns a digit");
};

struct ScanConfig {
  static constexpr int kThreads = 512;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kItems = 4;
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

struct RadixPass {
  const uint64_t* keys;
  const int32_t* payload;
  uint64_t* keys_out;
  int32_t* payload_out;
  int32_t* counts; // [kDigits, tiles]
  int64_t count;
  int64_t tiles;
  int shift;
};

SPARSENET_DEVICE int digit_of(uint64_t key, int shift) {
  return static_cast<int>((key >> shift) & (RadixConfig::kDigits - 1));
}

static SPARSENET_KERNEL(RadixConfig::kThreads) radix_count_kernel(const RadixPass p) {
  const Shared<int32_t> counts = shared_array<int32_t>(0);
  counts[thread_index()] = 0;
  sync_block();
  for (int round = 0; round < RadixConfig::kRounds; ++round) {
    const int64_t i = block_index() * RadixConfig::kTile + round * RadixConfig::kThreads + thread_index();
    if (i < p.count) atomic_add(counts + digit_of(load_global(p.keys + i), p.shift), 1);
  }
  sync_block();
  const int32_t mine = counts[thread_index()];
  store_global(p.counts + thread_index() * p.tiles + block_index(), mine);
}

static SPARSENET_KERNEL(ScanConfig::kThreads) radix_scan_kernel(const RadixPass p) {
  const Shared<int32_t> scratch = shared_array<int32_t>(0);
  const int64_t count = RadixConfig::kDigits * p.tiles;
  int32_t carry = 0;
  for (int64_t first = 0; first < count; first += ScanConfig::kThreads * ScanConfig::kItems) {
    const int64_t begin = first + static_cast<int64_t>(thread_index()) * ScanConfig::kItems;
    int32_t items[ScanConfig::kItems];
    int32_t sum = 0;
    SPARSENET_UNROLL
    for (int i = 0; i < ScanConfig::kItems; ++i) {
      items[i] = begin + i < count ? load_global(p.counts + begin + i) : 0;
      sum += items[i];
    }
    int32_t total = 0;
    int32_t offset = carry + block_exclusive_scan<ScanConfig::kWarps>(sum, scratch, total);
    SPARSENET_UNROLL
    for (int i = 0; i < ScanConfig::kItems; ++i) {
      if (begin + i < count) store_global(p.counts + begin + i, offset);
      offset += items[i];
    }
    carry += total;
  }
}

static SPARSENET_KERNEL(RadixConfig::kThreads) radix_scatter_kernel(const RadixPass p) {
  const Shared<int32_t> next = shared_array<int32_t>(0); // [kDigits]
  const Shared<int32_t> warp_counts =
      shared_array<int32_t>(sizeof(int32_t) * RadixConfig::kDigits); // [kWarps][kDigits]
  const int thread = thread_index();
  next[thread] = load_global(p.counts + thread * p.tiles + block_index());
  for (int round = 0; round < RadixConfig::kRounds; ++round) {
    const int64_t i = block_index() * RadixConfig::kTile + round * RadixConfig::kThreads + thread;
    const bool valid = i < p.count;
    const uint64_t key = valid ? load_global(p.keys + i) : 0;
    const int digit = digit_of(key, p.shift);
    for (int warp = 0; warp < RadixConfig::kWarps; ++warp) warp_counts[warp * RadixConfig::kDigits + thread] = 0;
    uint32_t peers = ballot(valid); // lanes with my digit
    SPARSENET_UNROLL
    for (int bit = 0; bit < RadixConfig::kDigitBits; ++bit) {
      const bool set = (digit >> bit) & 1;
      const uint32_t lanes = ballot(set);
      peers &= set ? lanes : ~lanes;
    }
    const int rank = count_bits(peers & ((1u << lane_index()) - 1));
    sync_block();
    if (valid && rank == 0) warp_counts[warp_index() * RadixConfig::kDigits + digit] = count_bits(peers);
    sync_block();
    int32_t position = next[thread];
    for (int warp = 0; warp < RadixConfig::kWarps; ++warp) {
      const int32_t count = warp_counts[warp * RadixConfig::kDigits + thread];
      warp_counts[warp * RadixConfig::kDigits + thread] = position;
      position += count;
    }
    next[thread] = position;
    sync_block();
    if (valid) {
      const int64_t target = warp_counts[warp_index() * RadixConfig::kDigits + digit] + rank;
      store_global(p.keys_out + target, key);
      store_global(p.payload_out + target, load_global(p.payload + i));
    }
    sync_block(); // the counts are cleared next
  }
}

struct SortBuffers {
  uint64_t* keys;
  int32_t* payload;
  uint64_t* other_keys;
  int32_t* other_payload;
  int32_t* counts;
  int64_t count;
};

inline int64_t radix_counts_size(int64_t count) {
  return RadixConfig::kDigits * (count > 0 ? ceil_div(count, RadixConfig::kTile) : 1);
}

// Sorts by the low `bits` bits; on return buffers.keys and .payload are the sorted ones.
inline void radix_sort(SortBuffers& buffers, int bits, Stream stream) {
  const int64_t tiles = ceil_div(buffers.count, RadixConfig::kTile);
  for (int shift = 0; shift < bits && tiles > 0; shift += RadixConfig::kDigitBits) {
    const RadixPass pass{
        buffers.keys, buffers.payload, buffers.other_keys, buffers.other_payload, buffers.counts, buffers.count, tiles,
        shift};
    constexpr int64_t kWord = sizeof(int32_t);
    launch("radix_count", radix_count_kernel,
           {.ctas = tiles, .threads = RadixConfig::kThreads, .shared_bytes = kWord * RadixConfig::kDigits}, stream,
           pass);
    launch("radix_scan", radix_scan_kernel,
           {.ctas = 1, .threads = ScanConfig::kThreads, .shared_bytes = kWord * (ScanConfig::kWarps + 1)}, stream,
           pass);
    launch("radix_scatter", radix_scatter_kernel,
           {.ctas = tiles,
            .threads = RadixConfig::kThreads,
            .shared_bytes = kWord * RadixConfig::kDigits * (1 + RadixConfig::kWarps)},
           stream, pass);
    std::swap(buffers.keys, buffers.other_keys);
    std::swap(buffers.payload, buffers.other_payload);
  }
}

} // namespace sparsenet::cuda
