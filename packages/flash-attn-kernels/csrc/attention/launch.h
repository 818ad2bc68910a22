// How kernels are started.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <climits>
#include <cstdint>
#include <stdexcept>

#include "../api/cuda_check.h"

namespace flash_attn {

// Where kernels run. The device must be the current one.
struct LaunchTarget {
  int device;
  int multiprocessors;
  int shared_bytes_per_block;  // that it grants
  cudaStream_t stream;
};

template <typename Params>
void launch(void (*kernel)(Params), std::atomic<uint64_t>& prepared_devices, int64_t blocks, int threads,
            int shared_bytes, const LaunchTarget& target, const Params& params) {
  if (blocks == 0) return;
  if (blocks > INT_MAX) throw std::runtime_error("batch * heads * seqlen is too large for one launch");
  const uint64_t bit = target.device < 64 ? uint64_t{1} << target.device : 0;
  if (shared_bytes > 48 * 1024 && (prepared_devices.load(std::memory_order_relaxed) & bit) == 0) {
    FLASH_ATTN_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    prepared_devices.fetch_or(bit, std::memory_order_relaxed);
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, target.stream>>>(params);
  FLASH_ATTN_CUDA_CHECK(cudaGetLastError());
}

// Starts a kernel; its permission to use much shared memory is asked for once for each device.
template <auto kKernel, typename Params>
void launch(int64_t blocks, int threads, int shared_bytes, const LaunchTarget& target, const Params& params) {
  static std::atomic<uint64_t> prepared_devices{0};
  launch(kKernel, prepared_devices, blocks, threads, shared_bytes, target, params);
}

}  // namespace flash_attn
