#include "planted.h"

#include <map>
#include <stdexcept>

#include "cuda/device/intrinsics.cuh"
#include "cuda/host/launch.h"

namespace sparsenet::emulator {

namespace {

using namespace sparsenet::cuda;

// Kernels of 64 threads over `count` = 64 values (one CTA) unless they say otherwise. ------------------------------
constexpr int kThreads = 64;

// output = input reversed, through shared memory.
template <bool kBarrier>
void reverse(const PlantedParams p) {
  const Shared<float> s = shared_array<float>(0);
  s[thread_index()] = load_global(p.input + thread_index());
  if (kBarrier) sync_block();
  const float value = s[kThreads - 1 - thread_index()];
  store_global(p.output + thread_index(), value);
}

// output[t] = input[t - 1]; without the barrier it is still right when threads happen to run in ascending order.
template <bool kBarrier>
void shift(const PlantedParams p) {
  const Shared<float> s = shared_array<float>(0);
  s[thread_index()] = load_global(p.input + thread_index());
  if (kBarrier) sync_block();
  float value = 0;
  if (thread_index() > 0) value = s[thread_index() - 1];
  store_global(p.output + thread_index(), value);
}

// The same within a warp, ordered by sync_warp.
template <bool kBarrier>
void shift_in_warp(const PlantedParams p) {
  const Shared<float> s = shared_array<float>(0);
  s[thread_index()] = load_global(p.input + thread_index());
  if (kBarrier) sync_warp();
  const int from = thread_index() % 32 == 0 ? thread_index() : thread_index() - 1;
  const float value = s[from];
  store_global(p.output + thread_index(), value);
}

// Two rounds through one buffer: the second store needs a barrier after the first round's reads.
template <bool kBarrier>
void reuse(const PlantedParams p) {
  const Shared<float> s = shared_array<float>(0);
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    if (kBarrier && round > 0) sync_block();
    s[thread_index()] = load_global(p.input + thread_index());
    sync_block();
    const float value = s[(thread_index() + 1) % kThreads];
    sum += value;
  }
  store_global(p.output + thread_index(), sum);
}

// Copies the tile; kPast threads copy one element too many, in global or in shared memory.
template <int kGlobalPast, int kSharedPast>
void copy_tile(const PlantedParams p) {
  const Shared<float> s = shared_array<float>(0);
  const int i = thread_index() + (thread_index() == kThreads - 1 ? kGlobalPast : 0);
  const float value = load_global(p.input + i);
  s[thread_index() + (thread_index() == kThreads - 1 ? kSharedPast : 0)] = value;
  sync_block();
  const float mine = s[thread_index()];
  store_global(p.output + thread_index(), mine);
}

void read_unwritten(const PlantedParams p) {
  const Shared<float> s = shared_array<float>(0);
  if (thread_index() != 7) s[thread_index()] = 1;
  sync_block();
  const float value = s[thread_index()];
  store_global(p.output + thread_index(), value);
}

void barrier_skipped(const PlantedParams p) {
  if (thread_index() < 40) sync_block();
  store_global(p.output + thread_index(), load_global(p.input + thread_index()));
}

void barrier_elsewhere(const PlantedParams p) {
  if (thread_index() < 32) {
    sync_block();
  } else {
    sync_block();
  }
  store_global(p.output + thread_index(), load_global(p.input + thread_index()));
}

void shuffle_lacks_lanes(const PlantedParams p) {
  float value = load_global(p.input + thread_index());
  if (thread_index() % 32 < 16) value = shuffle_xor(value, 1);
  store_global(p.output + thread_index(), value);
}

void warp_disagrees(const PlantedParams p) {
  float value = load_global(p.input + thread_index());
  if (thread_index() % 2 == 0)
    value = shuffle_xor(value, 1);
  else
    value = shuffle_up(value, 1);
  store_global(p.output + thread_index(), value);
}

// Two CTAs; each should write its own half.
template <bool kOwnHalf>
void write_halves(const PlantedParams p) {
  const int64_t i = kOwnHalf ? block_index() * 32 + thread_index() : thread_index();
  store_global(p.output + i, load_global(p.input + i));
}

void write_input(const PlantedParams p) { store_global(const_cast<float*>(p.input) + thread_index(), 1.0f); }

// cp.async: 16 chunks of 16 bytes by threads 0..15; two groups of 8.
template <int kPending, bool kBarrier, bool kCommit, int kMisalign>
void stream_in(const PlantedParams p) {
  const Shared<float> s = shared_array<float>(0);
  const int chunk = thread_index();
  for (int group = 0; group < 2; ++group) {
    if (chunk < 16 && chunk / 8 == group) async_copy_16(s + 4 * chunk, p.input + 4 * chunk + kMisalign, 16);
    if (kCommit) async_commit();
  }
  async_wait<kPending>();
  if (kBarrier) sync_block();
  const float value = s[kBarrier ? thread_index() : 63 - thread_index()];
  store_global(p.output + thread_index(), value);
}

// An 8-row tile of 64 halves a row (128 bytes), written in 16-byte chunks and read by ldmatrix; the swizzle keeps the
// eight rows of one matrix in different banks. output[lane] = first word of matrix 0. One warp.
template <int kWriteMask, int kReadMask>
void swizzled(const PlantedParams p) {
  const Shared<uint16_t> s = shared_array<uint16_t>(0);
  for (int chunk = lane_index(); chunk < 64; chunk += 32) {
    const int row = chunk / 8, column = chunk % 8;
    for (int e = 0; e < 8; ++e) {
      const auto value = static_cast<uint16_t>(load_global(p.input + row * 8 + column) * 8 + static_cast<float>(e));
      s[row * 64 + (column ^ (row & kWriteMask)) * 8 + e] = value;
    }
  }
  sync_warp();
  uint32_t words[4];
  const int row = lane_index() % 8, column = lane_index() / 8;
  load_matrix_x4(words, s + (row * 64 + (column ^ (row & kReadMask)) * 8));
  store_global(p.output + lane_index(), static_cast<float>(words[0] & 0xffff));
}

// Column-wise reads of a [32][pitch] tile of floats: pitch 32 puts a column in one bank. One warp.
template <int kPitch>
void column_reads(const PlantedParams p) {
  const Shared<float> s = shared_array<float>(0);
  for (int row = 0; row < 32; ++row) s[row * kPitch + lane_index()] = static_cast<float>(row);
  sync_warp();
  float sum = 0;
  for (int column = 0; column < 32; ++column) {
    const float value = s[lane_index() * kPitch + column];
    sum += value;
  }
  sync_warp();
  store_global(p.output + lane_index(), sum);
}

struct Planted {
  void (*kernel)(PlantedParams);
  LaunchShape shape;
};

const std::map<std::string, Planted>& planted() {
  constexpr LaunchShape kTwoWarps{.ctas = 1, .threads = 64, .shared_bytes = 256};
  constexpr LaunchShape kTwoCtas{.ctas = 2, .threads = 32, .shared_bytes = 0};
  constexpr LaunchShape kOneWarp{.ctas = 1, .threads = 32, .shared_bytes = 8192};
  static const std::map<std::string, Planted> kernels = {
      {"right_reverse", {reverse<true>, kTwoWarps}},
      {"right_shift", {shift<true>, kTwoWarps}},
      {"right_shift_in_warp", {shift_in_warp<true>, kTwoWarps}},
      {"right_reuse", {reuse<true>, kTwoWarps}},
      {"right_copy_tile", {copy_tile<0, 0>, kTwoWarps}},
      {"right_write_halves", {write_halves<true>, kTwoCtas}},
      {"right_stream_in", {stream_in<0, true, true, 0>, kTwoWarps}},
      {"right_swizzled", {swizzled<7, 7>, kOneWarp}},
      {"right_column_reads", {column_reads<33>, kOneWarp}},
      {"missing_barrier", {reverse<false>, kTwoWarps}},
      {"race_hidden_by_order", {shift<false>, kTwoWarps}},
      {"missing_warp_barrier", {shift_in_warp<false>, kTwoWarps}},
      {"missing_barrier_before_reuse", {reuse<false>, kTwoWarps}},
      {"tile_past_global_end", {copy_tile<1, 0>, kTwoWarps}},
      {"tile_past_shared_end", {copy_tile<0, 1>, kTwoWarps}},
      {"read_unwritten", {read_unwritten, kTwoWarps}},
      {"barrier_skipped", {barrier_skipped, kTwoWarps}},
      {"barrier_elsewhere", {barrier_elsewhere, kTwoWarps}},
      {"shuffle_lacks_lanes", {shuffle_lacks_lanes, kTwoWarps}},
      {"warp_disagrees", {warp_disagrees, kTwoWarps}},
      {"two_ctas_write_same", {write_halves<false>, kTwoCtas}},
      {"write_input", {write_input, kTwoWarps}},
      {"wait_one_group_short", {stream_in<1, true, true, 0>, kTwoWarps}},
      {"missing_barrier_after_wait", {stream_in<0, false, true, 0>, kTwoWarps}},
      {"copy_never_committed", {stream_in<0, true, false, 0>, kTwoWarps}},
      {"misaligned_copy", {stream_in<0, true, true, 1>, kTwoWarps}},
      {"wrong_swizzle", {swizzled<7, 3>, kOneWarp}},
      {"no_swizzle", {swizzled<0, 0>, kOneWarp}},
      {"column_in_one_bank", {column_reads<32>, kOneWarp}},
      {"too_much_shared_memory", {reverse<true>, {.ctas = 1, .threads = 64, .shared_bytes = 1 << 20}}},
  };
  return kernels;
}

} // namespace

std::vector<std::string> planted_names() {
  std::vector<std::string> names;
  for (const auto& entry : planted()) names.push_back(entry.first);
  return names;
}

void run_planted(const std::string& name, const PlantedParams& params) {
  const auto found = planted().find(name);
  if (found == planted().end()) throw std::invalid_argument("run_planted: name must be known, got " + name);
  launch(name.c_str(), found->second.kernel, found->second.shape, 0, params);
}

} // namespace sparsenet::emulator
