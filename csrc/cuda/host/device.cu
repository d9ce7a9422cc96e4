// What the machine offers: one reading per device, and a sentence when there is nothing to use.
#include <array>
#include <mutex>

#include "launch.h"

namespace sparsenet::cuda {

namespace {

constexpr int kMostDevices = 64;

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check_runtime(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

} // namespace

const DeviceProperties& device_properties() {
  static std::array<DeviceProperties, kMostDevices> known;
  static std::array<std::once_flag, kMostDevices> read;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) throw std::runtime_error("CUDA: " + device_info().status);
  SPARSENET_CHECK(device < kMostDevices, "device: number must be below ", kMostDevices, ", got ", device);
  const auto index = static_cast<size_t>(device);
  std::call_once(read[index], [&] {
    known[index] = {.arch = 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                            attribute(cudaDevAttrComputeCapabilityMinor, device),
                    .num_multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device),
                    .shared_bytes_per_cta = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)};
  });
  return known[index];
}

DeviceInfo device_info() {
  DeviceInfo info;
  info.runtime_version = CUDART_VERSION;
  cudaDriverGetVersion(&info.driver_version);
  if (info.driver_version == 0) {
    info.status = "no NVIDIA driver is installed";
    return info;
  }
  const cudaError_t counted = cudaGetDeviceCount(&info.num_devices);
  if (counted != cudaSuccess || info.num_devices == 0) {
    cudaGetLastError();
    info.num_devices = 0;
    info.status = counted == cudaErrorInsufficientDriver
                      ? "the NVIDIA driver supports CUDA " + version_text(info.driver_version) + ", older than CUDA " +
                            version_text(info.runtime_version) + " that sparsenet was built with: update the driver"
                      : std::string("no CUDA device can be used: ") + cudaGetErrorString(counted);
    return info;
  }
  int device = 0;
  cudaDeviceProp properties{};
  if (cudaGetDevice(&device) != cudaSuccess || cudaGetDeviceProperties(&properties, device) != cudaSuccess) {
    info.status = std::string("the CUDA device can't be read: ") + cudaGetErrorString(cudaGetLastError());
    return info;
  }
  info.name = properties.name;
  info.arch = 10 * properties.major + properties.minor;
  info.num_multiprocessors = properties.multiProcessorCount;
  info.shared_bytes_per_cta = static_cast<int64_t>(properties.sharedMemPerBlockOptin);
  info.l2_bytes = properties.l2CacheSize;
  info.memory_bytes = static_cast<int64_t>(properties.totalGlobalMem);
  info.status = "ok";
  return info;
}

} // namespace sparsenet::cuda
