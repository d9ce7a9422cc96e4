// What the host side of a kernel needs: a checked launch that names kernel and grid on failure, device properties,
// and copies on a stream. Under SPARSENET_EMULATOR the same names run on the host (tests/cuda/emulator/runtime_host.h).
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

#include "ops.h"

#ifdef __CUDACC__
  #define SPARSENET_HOST_DEVICE __host__ __device__
#else
  #define SPARSENET_HOST_DEVICE
#endif

namespace sparsenet::cuda {

// A one-dimensional grid is enough for every kernel here: 2^31 - 1 CTAs.
struct LaunchShape {
  int64_t ctas = 1;
  int threads = 128;
  int64_t shared_bytes = 0;
};

SPARSENET_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
SPARSENET_HOST_DEVICE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline std::string describe_launch(const char* kernel, const LaunchShape& shape) {
  std::ostringstream text;
  text << kernel << ": grid of " << shape.ctas << " CTAs x " << shape.threads << " threads with " << shape.shared_bytes
       << " bytes of shared memory";
  return text.str();
}

inline void check_launch_shape(const char* kernel, const LaunchShape& shape) {
  SPARSENET_CHECK(shape.ctas <= 2147483647, kernel, ": the grid must have at most 2147483647 CTAs, got ", shape.ctas);
}

} // namespace sparsenet::cuda

#ifdef SPARSENET_EMULATOR
  #include "emulator/runtime_host.h"
#else

  #include <cuda_runtime.h>

namespace sparsenet::cuda {

inline void check_runtime(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError(); // an error that is not sticky must not surface in the next call
  throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(error));
}

// Launches on the caller's stream; never synchronises.
template <typename Params>
void launch(const char* name, void (*kernel)(Params), const LaunchShape& shape, Stream stream, const Params& params) {
  if (shape.ctas == 0) return;
  check_launch_shape(name, shape);
  constexpr int64_t kDefaultSharedBytes = 48 * 1024;
  cudaError_t error = cudaSuccess;
  if (shape.shared_bytes > kDefaultSharedBytes) {
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shape.shared_bytes));
  }
  if (error == cudaSuccess) {
    void* arguments[] = {const_cast<Params*>(&params)};
    error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(shape.ctas)),
                             dim3(static_cast<unsigned>(shape.threads)), arguments,
                             static_cast<size_t>(shape.shared_bytes), reinterpret_cast<cudaStream_t>(stream));
  }
  if (error != cudaSuccess) check_runtime(error, describe_launch(name, shape).c_str());
}

inline void fill_bytes(void* destination, int byte, int64_t bytes, Stream stream) {
  check_runtime(cudaMemsetAsync(destination, byte, static_cast<size_t>(bytes), reinterpret_cast<cudaStream_t>(stream)),
                "cudaMemsetAsync");
}

// Waits for the stream: used only where a pattern is built or refused.
inline void copy_to_host(void* destination, const void* source, int64_t bytes, Stream stream) {
  const auto cuda_stream = reinterpret_cast<cudaStream_t>(stream);
  check_runtime(cudaMemcpyAsync(destination, source, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost, cuda_stream),
                "cudaMemcpyAsync");
  check_runtime(cudaStreamSynchronize(cuda_stream), "cudaStreamSynchronize");
}

} // namespace sparsenet::cuda

#endif // SPARSENET_EMULATOR

namespace sparsenet::cuda {

// The least a kernel choice needs to know of a device. Read once per device (device.cu).
struct DeviceProperties {
  int arch = 0; // 10 * major + minor
  int num_multiprocessors = 0;
  int64_t shared_bytes_per_cta = 0;
};
const DeviceProperties& device_properties();

} // namespace sparsenet::cuda
