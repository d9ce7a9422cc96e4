// The host twin of csrc/cuda/device/intrinsics.cuh: the same names, run and checked by the emulator.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#include "emulator.h"

#define SPARSENET_DEVICE inline
#define SPARSENET_KERNEL(...) void
#define SPARSENET_UNROLL
#define SPARSENET_UNROLL_4
#define SPARSENET_NO_UNROLL

namespace sparsenet::cuda {

using Where = std::source_location;
inline emulator::Emulator& emulated() { return emulator::Emulator::instance(); }

// 16-bit types: storage plus exact conversions, round to nearest even.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float to_accumulator(float value) { return value; }
inline double to_accumulator(double value) { return value; }
inline float to_accumulator(bfloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
inline float to_accumulator(float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t exponent = (value.bits >> 10) & 31u, mantissa = value.bits & 1023u;
  if (exponent == 31) return float_of(sign | 0x7f800000u | (mantissa << 13));
  const float magnitude = exponent == 0
                              ? std::ldexp(static_cast<float>(mantissa), -24)
                              : std::ldexp(static_cast<float>(mantissa | 1024u), static_cast<int>(exponent) - 25);
  return sign != 0 ? -magnitude : magnitude;
}

inline bfloat16 round_to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  if (value != value) return {static_cast<uint16_t>(0x7fff)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
inline float16 round_to_float16(float value) {
  const uint16_t sign = static_cast<uint16_t>((bits_of(value) >> 16) & 0x8000u);
  const float magnitude = std::fabs(value);
  if (value != value) return {static_cast<uint16_t>(0x7fff)};
  if (magnitude == 0) return {sign};
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00u)};
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  const int unit = (exponent < -13 ? -13 : exponent) - 11; // exponent of the last place
  const auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, -unit)));
  // steps counts units of 2^unit; subnormals keep exponent field 0, and a carry moves into the exponent by itself.
  const uint32_t field = exponent < -13 ? steps : ((static_cast<uint32_t>(exponent + 13) << 10) + steps);
  return {static_cast<uint16_t>(sign | field)};
}

template <typename T, typename Accumulator>
inline T from_accumulator(Accumulator value) {
  if constexpr (std::is_same_v<T, bfloat16>)
    return round_to_bfloat16(value);
  else if constexpr (std::is_same_v<T, float16>)
    return round_to_float16(value);
  else
    return static_cast<T>(value);
}

inline float exponential(float value) { return std::exp(value); }
inline double exponential(double value) { return std::exp(value); }
inline float divide(float a, float b) { return a / b; }
inline double divide(double a, double b) { return a / b; }
inline float error_function(float value) { return std::erf(value); }
inline double error_function(double value) { return std::erf(value); }

// Indices and barriers ------------------------------------------------------------------------------------------------
inline int thread_index() { return emulated().thread_index(); }
inline int lane_index() { return emulated().thread_index() % 32; }
inline int warp_index() { return emulated().thread_index() / 32; }
inline int64_t block_index() { return emulated().block_index(); }

inline void sync_block(const Where& where = Where::current()) { emulated().sync_block(where); }
inline void sync_warp(const Where& where = Where::current()) { emulated().sync_warp(where); }

template <typename T>
T shuffle(T value, int lane, const char* kind, const Where& where) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>, "shuffles move up to 8 bytes");
  emulator::WarpArgument mine;
  mine.kind = kind;
  mine.lane = lane;
  std::memcpy(&mine.value, &value, sizeof(T));
  emulated().warp_operation(
      mine,
      [](emulator::Emulator&, emulator::WarpArgument* const* lanes) {
        uint64_t in[32];
        for (int i = 0; i < 32; ++i) in[i] = lanes[i]->value;
        for (int i = 0; i < 32; ++i)
          if (lanes[i]->lane >= 0 && lanes[i]->lane < 32) lanes[i]->value = in[lanes[i]->lane];
      },
      where);
  T result;
  std::memcpy(&result, &mine.value, sizeof(T));
  return result;
}
template <typename T>
T shuffle_xor(T value, int lane_mask, const Where& where = Where::current()) {
  return shuffle(value, lane_index() ^ lane_mask, "shuffle_xor", where);
}
template <typename T>
T shuffle_up(T value, int delta, const Where& where = Where::current()) {
  return shuffle(value, lane_index() - delta, "shuffle_up", where); // below lane 0: keeps its own
}
template <typename T>
T shuffle_from(T value, int lane, const Where& where = Where::current()) {
  return shuffle(value, lane, "shuffle_from", where);
}
inline uint32_t ballot(bool predicate, const Where& where = Where::current()) {
  emulator::WarpArgument mine;
  mine.kind = "ballot";
  mine.value = predicate ? 1 : 0;
  emulated().warp_operation(
      mine,
      [](emulator::Emulator&, emulator::WarpArgument* const* lanes) {
        uint64_t bits = 0;
        for (int i = 0; i < 32; ++i) bits |= lanes[i]->value << i;
        for (int i = 0; i < 32; ++i) lanes[i]->value = bits;
      },
      where);
  return static_cast<uint32_t>(mine.value);
}

// Memory --------------------------------------------------------------------------------------------------------------
template <typename T>
class SharedReference {
public:
  explicit SharedReference(uint32_t offset) : offset_(offset) {}
  operator T() const {
    T value;
    emulated().read_shared(offset_, &value, sizeof(T));
    return value;
  }
  const SharedReference& operator=(const T& value) const {
    emulated().write_shared(offset_, &value, sizeof(T));
    return *this;
  }
  const SharedReference& operator=(const SharedReference& other) const { return *this = static_cast<T>(other); }
  const SharedReference& operator+=(const T& value) const { return *this = static_cast<T>(*this) + value; }

private:
  uint32_t offset_;
};

template <typename T>
struct Shared {
  static_assert(sizeof(T) % 2 == 0 && std::is_trivially_copyable_v<T>, "the shadow memory has 2-byte granules");
  uint32_t offset = 0;
  SharedReference<T> operator[](int64_t index) const {
    return SharedReference<T>(static_cast<uint32_t>(offset + index * static_cast<int64_t>(sizeof(T))));
  }
  Shared operator+(int64_t index) const {
    return {static_cast<uint32_t>(offset + index * static_cast<int64_t>(sizeof(T)))};
  }
};

template <typename T>
Shared<T> shared_array(int64_t byte_offset) {
  return {static_cast<uint32_t>(byte_offset)};
}
template <typename U, typename T>
Shared<U> shared_cast(Shared<T> pointer) {
  return {pointer.offset};
}

template <typename T>
T load_global(const T* pointer) {
  emulated().check_global(pointer, sizeof(T), false);
  T value;
  std::memcpy(&value, pointer, sizeof(T));
  return value;
}
template <typename T>
void store_global(T* pointer, T value) {
  emulated().check_global(pointer, sizeof(T), true);
  std::memcpy(pointer, &value, sizeof(T));
}

inline void atomic_min_global(unsigned long long* pointer, unsigned long long value) {
  emulated().check_global(pointer, sizeof(value), true, true);
  if (value < *pointer) *pointer = value;
}

template <typename T>
void async_copy_16(Shared<T> destination, const T* source, int valid_bytes) {
  emulated().async_copy(destination.offset, source, valid_bytes);
}
inline void async_commit() { emulated().async_commit(); }
template <int kPendingGroups>
void async_wait() {
  emulated().async_wait(kPendingGroups);
}

// Matrix instructions
// ---------------------------------------------------------------------------------------------------
template <bool kTransposed>
void load_matrix(uint32_t (&r)[4], uint32_t offset, const Where& where) {
  emulator::WarpArgument mine;
  mine.kind = kTransposed ? "load_matrix_x4_trans" : "load_matrix_x4";
  mine.offset = offset;
  mine.out = r;
  emulated().check_matrix_row(offset);
  emulated().warp_operation(
      mine,
      [](emulator::Emulator& self, emulator::WarpArgument* const* lanes) {
        for (int lane = 0; lane < 32; ++lane) {
          for (int matrix = 0; matrix < 4; ++matrix) {
            uint32_t word = 0;
            for (int half = 0; half < 2; ++half) {
              const int row = kTransposed ? 2 * (lane % 4) + half : lane / 4;
              const int column = kTransposed ? lane / 4 : 2 * (lane % 4) + half;
              const uint32_t address = lanes[matrix * 8 + row]->offset + 2 * static_cast<uint32_t>(column);
              word |= static_cast<uint32_t>(self.read_shared_as_lane(address, lane)) << (16 * half);
            }
            lanes[lane]->out[matrix] = word;
          }
        }
      },
      where);
}
template <typename T>
void load_matrix_x4(uint32_t (&r)[4], Shared<T> row, const Where& where = Where::current()) {
  load_matrix<false>(r, row.offset, where);
}
template <typename T>
void load_matrix_x4_trans(uint32_t (&r)[4], Shared<T> row, const Where& where = Where::current()) {
  load_matrix<true>(r, row.offset, where);
}

// Products and sums in double, rounded to float once per instruction: at least as exact as the hardware.
template <int kDepth, typename Element>
void multiply_tiles(emulator::WarpArgument* const* lanes, Element element) {
  double a[16][kDepth], b[kDepth][8];
  constexpr int kPack = kDepth == 16 ? 2 : 1;
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, quad = lane % 4;
    for (int part = 0; part < kPack; ++part) {
      for (int i = 0; i < 4; ++i)
        a[group + 8 * (i % 2)][kPack * quad + part + (kDepth / 2) * (i / 2)] = element(lanes[lane]->a[i], part);
      for (int i = 0; i < 2; ++i) b[kPack * quad + part + (kDepth / 2) * i][group] = element(lanes[lane]->b[i], part);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      double sum = lanes[lane]->d[i];
      for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[k][column];
      lanes[lane]->d[i] = static_cast<float>(sum);
    }
  }
}

inline void mma(const char* kind, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                void (*combine)(emulator::Emulator&, emulator::WarpArgument* const*), const Where& where) {
  emulator::WarpArgument mine;
  mine.kind = kind;
  mine.a = a;
  mine.b[0] = b0;
  mine.b[1] = b1;
  mine.d = d;
  emulated().warp_operation(mine, combine, where);
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  const Where& where = Where::current()) {
  mma(
      "mma_m16n8k16", d, a, b0, b1,
      [](emulator::Emulator&, emulator::WarpArgument* const* lanes) {
        multiply_tiles<16>(lanes, [](uint32_t word, int part) {
          return static_cast<double>(to_accumulator(T{static_cast<uint16_t>(word >> (16 * part))}));
        });
      },
      where);
}

inline uint32_t round_to_tf32(float value) {
  const uint32_t bits = bits_of(value);
  return value != value ? bits : (bits + 0x1000u) & 0xffffe000u; // to nearest, ties away from zero
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                             const Where& where = Where::current()) {
  mma(
      "mma_m16n8k8_tf32", d, a, b0, b1,
      [](emulator::Emulator&, emulator::WarpArgument* const* lanes) {
        // The unit ignores the low 13 bits whether or not they were rounded away.
        multiply_tiles<8>(lanes, [](uint32_t word, int) { return static_cast<double>(float_of(word & 0xffffe000u)); });
      },
      where);
}

} // namespace sparsenet::cuda
