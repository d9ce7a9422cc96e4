// forward and grad_input on tensor cores (sm_80 and later): mma.sync m16n8k16 of bfloat16 or float16, m16n8k8 of
// float32 as tf32, fp32 sums.
//
//   y[m, n] = activation(sum_k a[m, k] w(n, k) + bias[n])
//
// One CTA makes a kBatch x 128 tile of y: kGroup = 128 / b lines of blocks side by side. It walks the union of their
// block columns in ascending order, so an X tile that several lines need is loaded once:
//
//                      k: union of the group's block columns, 128 bytes a stage
//                     +----+----+----+----+
//   kBatch rows of a  | c0 | c1 | c2 | c3 |    a_s [kBatch][kDepth]          cp.async by all threads, 16 bytes each
//                     +----+----+----+----+
//                     | w  |    | w  |    |    w_s [128][kDepth] (forward)   only the blocks that exist are loaded;
//   128 columns of y  |    | w  | w  |    |    or [kDepth][128] (grad_input) a bit per line and column says which
//                     +----+----+----+----+
//
//   Warp i owns rows [i kBatch/4, (i+1) kBatch/4) and all 128 columns: its fragments of `a` stay in registers while it
//   goes through the lines that have the column. grad_input reads its blocks as they lie (fragments_sm80.cuh).
//   Every warp merges the lines' sorted columns by itself (lane g follows line g), so no barrier is needed for that;
//   column numbers are fetched one step before they are compared.
//   16-byte chunk c of row r lies at chunk c ^ (r % 8): ldmatrix and the copies meet no bank conflicts.
//
// Bytes from L2 per CTA, which makes kBatch * 128 outputs: e (kBatch b u + b b s) for u union columns, s blocks and e
// bytes an element; FLOP: 2 kBatch b b s.
// Long groups come in pieces (WorkItem), cut at columns of the group's longest line; pieces leave fp32 partial sums.
#pragma once

#include <cstring>

#include "block_sparse_linear_product.cuh"
#include "device/fragments_sm80.cuh"

namespace sparsenet::cuda {

struct alignas(8) Pair {
  float values[2];
};
struct alignas(16) Quad {
  float values[4];
};
struct alignas(8) Word8 {
  uint32_t words[2];
};

template <typename T>
SPARSENET_DEVICE uint32_t pack_pair(float low, float high) {
  const T pair[2] = {from_accumulator<T>(low), from_accumulator<T>(high)};
  uint32_t word;
  memcpy(&word, pair, sizeof(word));
  return word;
}

template <typename T, int kBlock_, int kBatch_>
struct Sm80ProductConfig {
  static constexpr int kBlock = kBlock_;
  static constexpr int kBatch = kBatch_;
  static constexpr int kThreads = 128;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kColumns = 128;           // of y
  static constexpr int kDepth = 128 / sizeof(T); // k columns of a stage
  static constexpr int kChunk = Fragment<T>::kChunk;
  static constexpr int kStages = 3;
  static constexpr int kGroup = kColumns / kBlock;
  static constexpr int kSlotDepth = kBlock < kDepth ? kBlock : kDepth;
  static constexpr int kSlots = kDepth / kSlotDepth;   // union columns of a stage
  static constexpr int kSteps = kBlock / kSlotDepth;   // stages that a block column takes
  static constexpr int kTilesM = kBatch / kWarps / 16; // m16 tiles of a warp
  static constexpr int kTilesN = kColumns / 8;
  static constexpr int kElementsA = kBatch * kDepth;
  static constexpr int kElementsW = kColumns * kDepth;
  static constexpr int kStageBytes = sizeof(T) * (kElementsA + kElementsW);
  static constexpr int kMaskOffset = kStages * kStageBytes; // [kStages][kSlots] words behind the stages
  static constexpr int kSharedBytes = kMaskOffset + 4 * kStages * kSlots;
  static constexpr int kStagedPitch = kColumns + 8; // floats; four rows of 8-byte pairs fall into different banks
  static_assert(kTilesM * 16 * kWarps == kBatch, "a warp owns whole m16 tiles");
  static_assert(kGroup >= 1 && kGroup <= 8, "a byte of the mask per union column");
  static_assert(kSlots == 1 || kSteps == 1, "a stage holds several block columns or a part of one");
  static_assert(4 * kBatch * kStagedPitch <= kMaskOffset, "the result is staged where the pipeline was");
};

constexpr int32_t kNoColumn = 0x7fffffff;

// One lane's view of its line: the block column it stands at, the one after, and where their values are.
template <typename T>
struct LineCursor {
  int32_t position, end;
  int32_t column, next_column;
  int32_t block, next_block;

  SPARSENET_DEVICE void fetch(const Product<T>& p, int32_t at, int32_t& column_out, int32_t& block_out) const {
    column_out = at < end ? load_global(p.indices + at) : kNoColumn;
    block_out = at < end && p.blocks != nullptr ? load_global(p.blocks + at) : at;
  }
  SPARSENET_DEVICE void start(const Product<T>& p, int32_t begin, int32_t line_end) {
    position = begin;
    end = line_end;
    fetch(p, position, column, block);
    fetch(p, position + 1, next_column, next_block);
  }
  SPARSENET_DEVICE void advance(const Product<T>& p) {
    ++position;
    column = next_column;
    block = next_block;
    fetch(p, position + 1, next_column, next_block);
  }
};

template <typename T, bool kTransposed, typename Config>
struct Sm80Product {
  const Product<T>& p;
  int64_t m0;
  LineCursor<T> cursor = {};
  int step = 0; // of the block column under way
  float sums[Config::kTilesM][Config::kTilesN][4] = {};

  SPARSENET_DEVICE Shared<T> stage_a(int stage) const { return shared_array<T>(stage * Config::kStageBytes); }
  SPARSENET_DEVICE Shared<T> stage_w(int stage) const {
    return shared_array<T>(stage * Config::kStageBytes + sizeof(T) * Config::kElementsA);
  }
  SPARSENET_DEVICE Shared<uint32_t> masks() const { return shared_array<uint32_t>(Config::kMaskOffset); }

  // Lane g takes line g of the group, from and to the columns that the work item names.
  SPARSENET_DEVICE void find_lines(const WorkItem& item) {
    const int lane = lane_index();
    const int64_t line = static_cast<int64_t>(item.group) * Config::kGroup + lane;
    int32_t begin = 0, end = 0;
    if (lane < Config::kGroup && line < ceil_div(p.n_size, Config::kBlock)) {
      begin = load_global(p.pointers + line);
      end = load_global(p.pointers + line + 1);
    }
    if (item.pieces > 1) {
      // Every lane learns the longest line (the lowest of equals) and where this piece starts and stops on it.
      int32_t longest = end - begin, longest_begin = begin;
      SPARSENET_UNROLL
      for (int distance = 1; distance < 32; distance *= 2) {
        const int32_t other = shuffle_xor(longest, distance), other_begin = shuffle_xor(longest_begin, distance);
        if (other > longest || (other == longest && other_begin < longest_begin)) {
          longest = other;
          longest_begin = other_begin;
        }
      }
      const int32_t first = cut(begin, end, longest_begin, longest, item.piece, item.pieces);
      end = cut(begin, end, longest_begin, longest, item.piece + 1, item.pieces);
      begin = first;
    }
    cursor.start(p, begin, end);
  }

  SPARSENET_DEVICE int32_t cut(int32_t begin, int32_t end, int32_t longest_begin, int32_t longest, int32_t piece,
                               int32_t pieces) const {
    if (piece == 0) return begin;
    if (piece == pieces) return end;
    const int32_t at = piece_start(longest, piece, pieces);
    if (at == longest) return end;
    const int32_t column = load_global(p.indices + longest_begin + at);
    int32_t low = begin, high = end;
    while (low < high) {
      const int32_t middle = low + (high - low) / 2;
      if (load_global(p.indices + middle) < column)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }

  SPARSENET_DEVICE int32_t smallest_column() const {
    int32_t smallest = cursor.column;
    SPARSENET_UNROLL
    for (int distance = 1; distance < Config::kGroup; distance *= 2) {
      const int32_t other = shuffle_xor(smallest, distance);
      if (other < smallest) smallest = other;
    }
    return shuffle_from(smallest, 0);
  }

  // Issues the copies of the next kSlots union columns (or of the next part of one) into a stage.
  SPARSENET_DEVICE void load_stage(int stage) {
    const int thread = thread_index();
    const Shared<T> a_s = stage_a(stage), w_s = stage_w(stage);
    // Of the a tile (and of w in forward) a thread copies chunk thread % 8 of several rows: always the same slot.
    const int a_chunk = thread % 8;
    constexpr int kSlotChunks = Config::kSlotDepth / Config::kChunk;
    SPARSENET_UNROLL
    for (int slot = 0; slot < Config::kSlots; ++slot) {
      const int32_t column = smallest_column();
      const bool mine = cursor.column == column && column != kNoColumn;
      const uint32_t mask = ballot(mine && lane_index() < Config::kGroup);
      if (thread == 0) masks()[stage * Config::kSlots + slot] = mask;
      const int32_t my_block = cursor.block;
      const int k_in_block = step * Config::kSlotDepth;
      if (mask != 0) {
        if (a_chunk / kSlotChunks == slot)
          copy_a(a_s, a_chunk, static_cast<int64_t>(column) * Config::kBlock + k_in_block);
        if constexpr (kTransposed) {
          copy_w_rows(w_s, slot, mask, my_block, k_in_block);
        } else {
          copy_w_columns(w_s, slot, mask, my_block, k_in_block, a_chunk);
        }
      }
      if (step + 1 < Config::kSteps && mask != 0) {
        ++step;
      } else {
        step = 0;
        if (mine) cursor.advance(p);
      }
    }
    async_commit();
  }

  SPARSENET_DEVICE void copy_a(Shared<T> a_s, int chunk, int64_t k_slot) const {
    constexpr int kChunk = Config::kChunk;
    const int64_t k = k_slot + chunk * kChunk % Config::kSlotDepth;
    const int64_t left = p.k_size - k;
    const int columns = left >= kChunk ? kChunk : left > 0 ? static_cast<int>(left) : 0;
    SPARSENET_UNROLL
    for (int row = thread_index() / 8; row < Config::kBatch; row += Config::kThreads / 8) {
      const bool inside = m0 + row < p.batch && columns > 0;
      const T* source = inside ? p.a + (m0 + row) * p.a_stride + k : p.a;
      async_copy_16(a_s + row * Config::kDepth + (chunk ^ (row & 7)) * kChunk, source,
                    inside ? static_cast<int>(sizeof(T)) * columns : 0);
    }
  }

  // forward: w_s[n][k] = values[n][k]
  SPARSENET_DEVICE void copy_w_columns(Shared<T> w_s, int slot, uint32_t mask, int32_t my_block, int k_in_block,
                                       int chunk) const {
    constexpr int kRowStep = Config::kThreads / 8;
    constexpr int kSlotChunks = Config::kSlotDepth / Config::kChunk;
    SPARSENET_UNROLL
    for (int g = 0; g < Config::kGroup; ++g) {
      const int64_t block = shuffle_from(my_block, g);
      if ((mask >> g & 1) == 0 || chunk / kSlotChunks != slot) continue;
      const T* values =
          p.values + block * Config::kBlock * Config::kBlock + k_in_block + chunk * Config::kChunk % Config::kSlotDepth;
      SPARSENET_UNROLL
      for (int n = thread_index() / 8; n < Config::kBlock; n += kRowStep) {
        const int row = g * Config::kBlock + n;
        async_copy_16(w_s + row * Config::kDepth + (chunk ^ (row & 7)) * Config::kChunk, values + n * Config::kBlock,
                      16);
      }
    }
  }

  // grad_input: w_s[k][n] = values[k][n]
  SPARSENET_DEVICE void copy_w_rows(Shared<T> w_s, int slot, uint32_t mask, int32_t my_block, int k_in_block) const {
    constexpr int kRowChunks = Config::kColumns / Config::kChunk;
    const int chunk = thread_index() % kRowChunks;
    const int g = chunk * Config::kChunk / Config::kBlock;
    const int64_t block = shuffle_from(my_block, g);
    if ((mask >> g & 1) == 0) return;
    const T* values = p.values + block * Config::kBlock * Config::kBlock + chunk * Config::kChunk % Config::kBlock;
    SPARSENET_UNROLL
    for (int k = thread_index() / kRowChunks; k < Config::kSlotDepth; k += Config::kThreads / kRowChunks) {
      const int row = slot * Config::kSlotDepth + k;
      async_copy_16(w_s + row * Config::kColumns + swizzled<T>(chunk, row) * Config::kChunk,
                    values + (k_in_block + k) * Config::kBlock, 16);
    }
  }

  SPARSENET_DEVICE void multiply_stage(int stage) {
    const int lane = lane_index();
    const Shared<T> a_s = stage_a(stage), w_s = stage_w(stage);
    SPARSENET_UNROLL
    for (int slot = 0; slot < Config::kSlots; ++slot) {
      const uint32_t mask = masks()[stage * Config::kSlots + slot];
      if (mask == 0) continue;
      SPARSENET_UNROLL
      for (int k = slot * Config::kSlotDepth; k < (slot + 1) * Config::kSlotDepth; k += Fragment<T>::kDepth) {
        uint32_t a[Config::kTilesM][4];
        SPARSENET_UNROLL
        for (int i = 0; i < Config::kTilesM; ++i) {
          const int row = (warp_index() * Config::kTilesM + i) * 16 + lane % 16, chunk = k / Config::kChunk + lane / 16;
          load_rows_x4(a[i], a_s + row * Config::kDepth + (chunk ^ (row & 7)) * Config::kChunk);
        }
        SPARSENET_UNROLL
        for (int g = 0; g < Config::kGroup; ++g) {
          if ((mask >> g & 1) == 0) continue;
          SPARSENET_UNROLL
          for (int n = g * Config::kBlock; n < (g + 1) * Config::kBlock; n += 16) {
            uint32_t w[4]; // the lower and upper half of k for columns n..n+7, then for n+8..n+15
            if constexpr (kTransposed) {
              load_columns_b<T, Config::kColumns>(w, w_s, k, n);
            } else {
              const int row = n + lane / 16 * 8 + lane % 8, chunk = k / Config::kChunk + lane / 8 % 2;
              load_rows_x4(w, w_s + row * Config::kDepth + (chunk ^ (row & 7)) * Config::kChunk);
            }
            SPARSENET_UNROLL
            for (int i = 0; i < Config::kTilesM; ++i) {
              multiply_add<T>(sums[i][n / 8], a[i], w[0], w[1]);
              multiply_add<T>(sums[i][n / 8 + 1], a[i], w[2], w[3]);
            }
          }
        }
      }
    }
  }

  SPARSENET_DEVICE void run() {
    for (int stage = 0; stage < Config::kStages - 1; ++stage) load_stage(stage);
    int stage = 0, free_stage = Config::kStages - 1;
    while (true) {
      async_wait<Config::kStages - 2>();
      sync_block(); // the stage is complete for all, and the stage read last is free again
      const uint32_t first_mask = masks()[stage * Config::kSlots];
      if (first_mask == 0) break; // the lines are exhausted
      load_stage(free_stage);
      multiply_stage(stage);
      free_stage = stage;
      stage = stage + 1 == Config::kStages ? 0 : stage + 1;
    }
  }

  // Tile row and column of sums[i][j][2 h .. 2 h + 1].
  SPARSENET_DEVICE int row_of(int i, int h) const {
    return (warp_index() * Config::kTilesM + i) * 16 + h * 8 + lane_index() / 4;
  }
  SPARSENET_DEVICE int column_of(int j) const { return j * 8 + lane_index() % 4 * 2; }

  // Sums to shared memory as fp32, so that what follows is one short loop with whole rows for consecutive lanes. The
  // pipeline's last barrier lies after its last read, so its memory is free.
  SPARSENET_DEVICE void stage_sums() const {
    const Shared<Pair> staged = shared_array<Pair>(0);
    SPARSENET_UNROLL
    for (int i = 0; i < Config::kTilesM; ++i) {
      SPARSENET_UNROLL
      for (int j = 0; j < Config::kTilesN; ++j) {
        SPARSENET_UNROLL
        for (int h = 0; h < 2; ++h)
          staged[(row_of(i, h) * Config::kStagedPitch + column_of(j)) / 2] =
              Pair{sums[i][j][2 * h], sums[i][j][2 * h + 1]};
      }
    }
    sync_block();
  }

  SPARSENET_DEVICE void write_tile(const WorkItem& item) const {
    const Shared<Quad> staged = shared_array<Quad>(0);
    const bool y_vectors = quads_aligned(p.y, p.y_stride);
    const bool pre_vectors = quads_aligned(p.pre_activation, p.pre_activation_stride);
    constexpr int kRowQuads = Config::kColumns / 4;
    SPARSENET_NO_UNROLL
    for (int i = thread_index(); i < Config::kBatch * kRowQuads; i += Config::kThreads) {
      const int row = i / kRowQuads, column = i % kRowQuads * 4;
      const int64_t m = m0 + row, n = static_cast<int64_t>(item.group) * Config::kColumns + column;
      if (m >= p.batch) continue;
      Quad quad = staged[(row * Config::kStagedPitch + column) / 4];
      if (item.slot >= 0) {
        store_global(
            reinterpret_cast<Quad*>(p.partials + ((item.slot + item.piece) * p.batch + m) * Config::kColumns + column),
            quad);
        continue;
      }
      if (p.bias != nullptr) {
        SPARSENET_UNROLL
        for (int e = 0; e < 4; ++e)
          quad.values[e] += n + e < p.n_size ? to_accumulator(load_global(p.bias + n + e)) : 0.0f;
      }
      if (p.pre_activation != nullptr) write_quad(p.pre_activation + m * p.pre_activation_stride, n, quad, pre_vectors);
      SPARSENET_UNROLL
      for (int e = 0; e < 4; ++e) quad.values[e] = activate(quad.values[e], p.activation);
      write_quad(p.y + m * p.y_stride, n, quad, y_vectors);
    }
  }

  SPARSENET_DEVICE static bool quads_aligned(const T* rows, int64_t stride) {
    return (reinterpret_cast<uintptr_t>(rows) | static_cast<uintptr_t>(stride * sizeof(T))) % (4 * sizeof(T)) == 0;
  }

  SPARSENET_DEVICE void write_quad(T* row, int64_t n, const Quad& quad, bool vectors) const {
    if (vectors && n + 4 <= p.n_size) {
      if constexpr (sizeof(T) == 4) {
        store_global(reinterpret_cast<Quad*>(row + n), quad);
        return;
      }
      const Word8 words{{pack_pair<T>(quad.values[0], quad.values[1]), pack_pair<T>(quad.values[2], quad.values[3])}};
      store_global(reinterpret_cast<Word8*>(row + n), words);
      return;
    }
    SPARSENET_UNROLL
    for (int e = 0; e < 4; ++e) {
      if (n + e < p.n_size) store_global(row + n + e, from_accumulator<T>(quad.values[e]));
    }
  }
};

template <typename T, bool kTransposed, typename Config>
SPARSENET_KERNEL(Config::kThreads, 2)
product_sm80_kernel(const Product<T> p) {
  const auto cta = static_cast<uint32_t>(block_index()),
             batch_tiles = static_cast<uint32_t>(ceil_div(p.batch, Config::kBatch));
  const WorkItem item = work_item(p, cta / batch_tiles);
  Sm80Product<T, kTransposed, Config> tile{p, static_cast<int64_t>(cta % batch_tiles) * Config::kBatch};
  tile.find_lines(item);
  tile.run();
  tile.stage_sums();
  tile.write_tile(item);
}

template <typename T, bool kTransposed, int kBlock, int kBatch>
void launch_product_config(const Product<T>& product, Stream stream) {
  using Config = Sm80ProductConfig<T, kBlock, kBatch>;
  const char* name = sizeof(T) == 4 ? (kTransposed ? "grad_input_tf32_sm80" : "forward_tf32_sm80")
                                    : (kTransposed ? "grad_input_sm80" : "forward_sm80");
  launch(name, product_sm80_kernel<T, kTransposed, Config>,
         {.ctas = product.num_items * ceil_div(product.batch, kBatch),
          .threads = Config::kThreads,
          .shared_bytes = Config::kSharedBytes},
         stream, product);
}

template <typename T, bool kTransposed, int kBlock>
void launch_product_block(const Product<T>& product, Stream stream) {
  if (product.batch <= 64)
    launch_product_config<T, kTransposed, kBlock, 64>(product, stream);
  else
    launch_product_config<T, kTransposed, kBlock, 128>(product, stream);
}

template <typename T, bool kTransposed>
void launch_product_sm80(const Product<T>& product, Stream stream) {
  switch (product.block_size) {
  case 16:
    return launch_product_block<T, kTransposed, 16>(product, stream);
  case 32:
    return launch_product_block<T, kTransposed, 32>(product, stream);
  case 64:
    return launch_product_block<T, kTransposed, 64>(product, stream);
  default:
    return launch_product_block<T, kTransposed, 128>(product, stream);
  }
}

} // namespace sparsenet::cuda
