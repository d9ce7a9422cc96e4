// The host twin of the CUDA runtime calls in csrc/cuda/host/launch.h: "device" memory is host memory, a launch runs at
// once.
#pragma once

#include <cstring>

#include "emulator.h"

namespace sparsenet::cuda {

// What the emulated device claims to be; tests change it to steer choose().
struct EmulatedDevice {
  int arch = 90;
  int num_multiprocessors = 4;
  int64_t shared_bytes_per_cta = 227 * 1024;
};
inline EmulatedDevice& emulated_device() {
  static EmulatedDevice device;
  return device;
}

template <typename Params>
emulator::Sizes sizes_of(const Params& p, int64_t ctas) {
  if constexpr (requires { p.product; })
    return sizes_of(p.product, ctas);
  else if constexpr (requires { p.k_size; })
    return {p.batch, p.n_size, p.k_size};
  else if constexpr (requires { p.batch; })
    return {p.batch, p.n_size, 0};
  else
    return {ctas, 0, 0};
}

template <typename Params>
void launch(const char* name, void (*kernel)(Params), const LaunchShape& shape, Stream, const Params& params) {
  if (shape.ctas == 0) return;
  check_launch_shape(name, shape);
  if (shape.shared_bytes > emulated_device().shared_bytes_per_cta || shape.threads > 1024)
    throw std::runtime_error(describe_launch(name, shape) + " failed: too many resources requested for launch");
  const emulator::Launch described = {name,
                                      reinterpret_cast<const void*>(kernel),
                                      sizes_of(params, shape.ctas),
                                      shape.ctas,
                                      shape.threads,
                                      shape.shared_bytes};
  emulator::Emulator::instance().run(described, [&] { kernel(params); });
}

inline void fill_bytes(void* destination, int byte, int64_t bytes, Stream) {
  std::memset(destination, byte, static_cast<size_t>(bytes));
}
inline void copy_to_host(void* destination, const void* source, int64_t bytes, Stream) {
  std::memcpy(destination, source, static_cast<size_t>(bytes));
}

} // namespace sparsenet::cuda
