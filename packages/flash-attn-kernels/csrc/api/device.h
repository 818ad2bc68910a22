// The device and the stream that an operator runs on.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <mutex>

#include "../attention/launch.h"
#include "cuda_check.h"

// Weak, so that the library also loads in CPU-only torch, which lacks this function.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace flash_attn::api {

inline cudaStream_t current_stream(const torch::stable::Tensor& tensor) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA streams");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

struct DeviceLimits {
  int shared_bytes_per_block;  // that one block may use when it asks for it
  int multiprocessors;
  int capability_major, capability_minor;
};

// Asked for once for each device: a query costs microseconds.
inline const DeviceLimits& device_limits(int device) {
  constexpr int kDevices = 64;
  static std::array<std::once_flag, kDevices> asked;
  static std::array<DeviceLimits, kDevices> limits;
  STD_TORCH_CHECK(device >= 0 && device < kDevices, "got device ", device, ", expected one below ", kDevices);
  std::call_once(asked[device], [device] {
    const auto ask = [device](int& answer, cudaDeviceAttr attribute) {
      FLASH_ATTN_CUDA_CHECK(cudaDeviceGetAttribute(&answer, attribute, device));
    };
    ask(limits[device].shared_bytes_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    ask(limits[device].multiprocessors, cudaDevAttrMultiProcessorCount);
    ask(limits[device].capability_major, cudaDevAttrComputeCapabilityMajor);
    ask(limits[device].capability_minor, cudaDevAttrComputeCapabilityMinor);
  });
  return limits[device];
}

// The device of the tensor, which must be the current one, and its current stream.
inline LaunchTarget launch_target(const torch::stable::Tensor& tensor) {
  const int device = tensor.get_device_index();
  const DeviceLimits& limits = device_limits(device);
  return {device, limits.multiprocessors, limits.shared_bytes_per_block, current_stream(tensor)};
}

}  // namespace flash_attn::api
