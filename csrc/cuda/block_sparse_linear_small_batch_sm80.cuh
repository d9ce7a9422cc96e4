// forward for a batch of at most 32 on tensor cores (sm_80 and later): the weights are the M side of the instruction,
// the batch its N side, so a batch of 8 wastes nothing and the kernel streams the weights once.
//
//   y^T[n, m] = sum_k values[n, k] x[m, k]
//
//   One CTA: kRows rows of one line of blocks (b = 128: four CTAs a line). Warp i takes blocks i, i + 4, ... of the
//   line; weights and x go from global memory to registers, 16 bytes a lane (8 for b = 16), without shared memory:
//
//     lane 4 g + q reads values[g][8 q .. 8 q + 7] and x[m = g][8 q .. 8 q + 7] of a 32-column piece (tf32: 4 q .. of
//     16 columns); words 0, 1 of both feed one instruction, words 2, 3 the next. The order of k inside an instruction
//     is then not the matrix's, but it is the same on both sides, and a sum does not mind.
//
//   The four warps' sums meet in shared memory and are added in warp order. Bytes: the weights once, x once per CTA
//   (from L2).
#pragma once

#include "block_sparse_linear_product_sm80.cuh"

namespace sparsenet::cuda {

template <typename T, int kBlock_, int kBatchTiles_>
struct Sm80SmallConfig {
  static constexpr int kBlock = kBlock_;
  static constexpr int kBatchTiles = kBatchTiles_; // n8 tiles of the batch
  static constexpr int kThreads = 128;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kRows = kBlock < 32 ? kBlock : 32;
  static constexpr int kRowTiles = kRows / 16;
  static constexpr int kWords = kBlock * sizeof(T) < 64 ? 2 : 4; // 4-byte words a lane reads of a row
  static constexpr int kPiece = 4 * kWords * Fragment<T>::kPack; // k columns of one read by four lanes
  static constexpr int kBatch = 8 * kBatchTiles;
  static constexpr int kPitch = kBatch + 1;
  static constexpr int kSharedBytes = 4 * kWarps * kRows * kPitch;
  static_assert(kBlock % kPiece == 0, "a block is walked in whole pieces");
};

// Words of `count` elements from k on, zeros past the end of the row.
template <typename T, int kWords>
SPARSENET_DEVICE void load_words(uint32_t (&words)[kWords], const T* source, int64_t count) {
  constexpr int kPack = Fragment<T>::kPack;
  struct alignas(4 * kWords) Vector {
    uint32_t words[kWords];
  };
  if (count >= kPack * kWords) {
    const Vector vector = load_global(reinterpret_cast<const Vector*>(source));
    SPARSENET_UNROLL
    for (int i = 0; i < kWords; ++i) words[i] = vector.words[i];
  } else {
    SPARSENET_UNROLL
    for (int i = 0; i < kWords; ++i) {
      const float low = kPack * i < count ? to_accumulator(load_global(source + kPack * i)) : 0.0f;
      if constexpr (kPack == 1) {
        words[i] = bits_of(low);
      } else {
        const float high = 2 * i + 1 < count ? to_accumulator(load_global(source + 2 * i + 1)) : 0.0f;
        words[i] = pack_pair<T>(low, high); // exact: the values are of this type
      }
    }
  }
  round_operands<T>(words);
}

// Two CTAs: without that bound ptxas aims at 64 registers for one of the instantiations and spills.
template <typename T, typename Config>
SPARSENET_KERNEL(Config::kThreads, 2)
product_small_sm80_kernel(const Product<T> p) {
  constexpr int kBlock = Config::kBlock, kWords = Config::kWords;
  constexpr int kSlabs = kBlock / Config::kRows;
  const int64_t line = block_index() / kSlabs;
  const int n_in_block = static_cast<int>(block_index() % kSlabs) * Config::kRows;
  const int group = lane_index() / 4, quad = lane_index() % 4;
  const int32_t end = load_global(p.pointers + line + 1);

  float sums[Config::kRowTiles][Config::kBatchTiles][4] = {};
  for (int32_t position = load_global(p.pointers + line) + warp_index(); position < end; position += Config::kWarps) {
    const int64_t k_block = static_cast<int64_t>(load_global(p.indices + position)) * kBlock;
    const T* values = p.values + (static_cast<int64_t>(position) * kBlock + n_in_block) * kBlock;
    SPARSENET_UNROLL_4
    for (int piece = 0; piece < kBlock; piece += Config::kPiece) {
      const int k_lane = piece + quad * Fragment<T>::kPack * kWords;
      uint32_t w[Config::kRowTiles][2][kWords], x[Config::kBatchTiles][kWords];
      SPARSENET_UNROLL
      for (int i = 0; i < Config::kRowTiles; ++i) {
        SPARSENET_UNROLL
        for (int h = 0; h < 2; ++h)
          load_words<T, kWords>(w[i][h], values + (i * 16 + h * 8 + group) * kBlock + k_lane,
                                Fragment<T>::kPack * kWords);
      }
      SPARSENET_UNROLL
      for (int j = 0; j < Config::kBatchTiles; ++j) {
        const int64_t m = j * 8 + group, k = k_block + k_lane;
        load_words<T, kWords>(x[j], p.a + m * p.a_stride + k, m < p.batch ? p.k_size - k : 0);
      }
      SPARSENET_UNROLL
      for (int s = 0; s < kWords; s += 2) {
        SPARSENET_UNROLL
        for (int i = 0; i < Config::kRowTiles; ++i) {
          const uint32_t a[4] = {w[i][0][s], w[i][1][s], w[i][0][s + 1], w[i][1][s + 1]};
          SPARSENET_UNROLL
          for (int j = 0; j < Config::kBatchTiles; ++j) multiply_add<T>(sums[i][j], a, x[j][s], x[j][s + 1]);
        }
      }
    }
  }

  const Shared<float> partial = shared_array<float>(0); // [kWarps][kRows][kPitch]
  SPARSENET_UNROLL
  for (int i = 0; i < Config::kRowTiles; ++i) {
    SPARSENET_UNROLL
    for (int j = 0; j < Config::kBatchTiles; ++j) {
      SPARSENET_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int row = i * 16 + e / 2 * 8 + group, m = j * 8 + quad * 2 + e % 2;
        partial[(warp_index() * Config::kRows + row) * Config::kPitch + m] = sums[i][j][e];
      }
    }
  }
  sync_block();
  for (int i = thread_index(); i < Config::kRows * Config::kBatch; i += Config::kThreads) {
    const int row = i % Config::kRows, m = i / Config::kRows;
    const int64_t n = line * kBlock + n_in_block + row;
    if (m >= p.batch || n >= p.n_size) continue;
    float sum = 0;
    SPARSENET_UNROLL
    for (int warp = 0; warp < Config::kWarps; ++warp) sum += partial[(warp * Config::kRows + row) * Config::kPitch + m];
    write_element(p, m, n, sum);
  }
}

template <typename T, int kBlock, int kBatchTiles>
void launch_product_small_config(const Product<T>& product, Stream stream) {
  using Config = Sm80SmallConfig<T, kBlock, kBatchTiles>;
  launch(sizeof(T) == 4 ? "forward_small_tf32_sm80" : "forward_small_sm80", product_small_sm80_kernel<T, Config>,
         {.ctas = static_cast<int64_t>(product.num_items) * (kBlock / Config::kRows),
          .threads = Config::kThreads,
          .shared_bytes = Config::kSharedBytes},
         stream, product);
}

template <typename T, int kBlock>
void launch_product_small_block(const Product<T>& product, Stream stream) {
  if (product.batch <= 8)
    launch_product_small_config<T, kBlock, 1>(product, stream);
  else if (product.batch <= 16)
    launch_product_small_config<T, kBlock, 2>(product, stream);
  else
    launch_product_small_config<T, kBlock, 4>(product, stream);
}

template <typename T>
void launch_product_small_batch_sm80(const Product<T>& product, Stream stream) {
  switch (product.block_size) {
  case 16:
    return launch_product_small_block<T, 16>(product, stream);
  case 32:
    return launch_product_small_block<T, 32>(product, stream);
  case 64:
    return launch_product_small_block<T, 64>(product, stream);
  default:
    return launch_product_small_block<T, 128>(product, stream);
  }
}

} // namespace sparsenet::cuda
