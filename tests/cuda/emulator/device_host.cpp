// The host twin of csrc/cuda/host/device.cu: the device that the tests describe.
#include "cuda/host/launch.h"

namespace sparsenet::cuda {

const DeviceProperties& device_properties() {
  static DeviceProperties properties;
  const EmulatedDevice& device = emulated_device();
  properties = {device.arch, device.num_multiprocessors, device.shared_bytes_per_cta};
  return properties;
}

DeviceInfo device_info() {
  const EmulatedDevice& device = emulated_device();
  DeviceInfo info;
  info.name = "emulated";
  info.arch = device.arch;
  info.num_multiprocessors = device.num_multiprocessors;
  info.shared_bytes_per_cta = device.shared_bytes_per_cta;
  info.num_devices = 1;
  info.status = "ok";
  return info;
}

} // namespace sparsenet::cuda
