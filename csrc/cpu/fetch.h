// Fetching lines of memory ahead of their use, a few at a time, from inside the kernels that compute.
#pragma once

#include "simd.h"

namespace sparsenet::cpu::SPARSENET_ISA {
namespace {

// What is fetched when there is nothing to fetch: a line that is there. Some processors (AMD's Zen 1) look up an
// address that belongs to no page, such as null, anew each time, which takes longer than the multiply-adds in between.
alignas(kLineBytes) constexpr char kNothing[kLineBytes] = {};

// `count` lines of memory, `stride` bytes apart.
struct Lines {
  const char* at = kNothing;
  int64_t stride = 0, count = 0;
};

// A matrix's lines in order, to be fetched a few at a time.
struct LinesAhead {
  const char* row = nullptr;
  int64_t stride = 0, rows = 0, row_bytes = 0, at = 0;

  template <typename T>
  static LinesAhead of(const T* data, int64_t stride, int64_t rows, int64_t cols) {
    const int64_t element = int64_t(sizeof(T));
    return {reinterpret_cast<const char*>(data), stride * element, cols > 0 ? max_of(rows, 0) : 0, cols * element, 0};
  }
  int64_t count() const { return rows * ceil_div(row_bytes, kLineBytes); }
  Lines next(int64_t most) { // no further than to the end of the row
    if (rows == 0) return {};
    const Lines lines = {row + at, kLineBytes, min_of(most, ceil_div(row_bytes - at, kLineBytes))};
    at += kLineBytes * lines.count;
    if (at >= row_bytes) {
      row += stride;
      at = 0;
      --rows;
    }
    return lines;
  }
};

// Lines that will soon be read or written. The kernels fetch one every few steps, so that lines arrive while they
// compute and never all at once: a core has a dozen or so misses in flight, and its own loads need them too. Lines that
// another task writes must not be among them: taking those away from its core costs more than it brings.
class FetchQueue {
public:
  void push(const Lines& lines) { push(lines.at, lines.stride, lines.count); }
  void push(const void* at, int64_t stride, int64_t count) {
    if (count <= 0 || size_ == kCapacity) return;
    queue_[size_++] = {static_cast<const char*>(at), stride, count};
  }
  void clear() { size_ = 0; }
  Lines to_l2; // beside those: more than L1 holds, wanted a little later

  // A kernel works on a copy of what comes first, in registers, and hands it back.
  SPARSENET_INLINE Lines take() const { return size_ > 0 ? queue_[0] : Lines{}; }
  SPARSENET_INLINE void give_back(const Lines& rest) {
    if (size_ == 0) return;
    queue_[0] = rest;
    if (rest.count > 0) return;
    for (int i = 1; i < size_; ++i) queue_[i - 1] = queue_[i];
    --size_;
  }
  template <int kLocality = 3> SPARSENET_INLINE static void fetch_one(Lines& lines) {
    __builtin_prefetch(lines.at, 0, kLocality);
    lines.at += lines.count > 1 ? lines.stride : 0;
    --lines.count;
  }

private:
  static constexpr int kCapacity = 8;
  Lines queue_[kCapacity];
  int size_ = 0;
};

} // namespace
} // namespace sparsenet::cpu::SPARSENET_ISA
