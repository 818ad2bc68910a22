// The launchers that the generated instantiations provide, and how they start a kernel.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <climits>
#include <cstdint>
#include <stdexcept>

#include "../../api/cuda_check.h"
#include "../params.h"
#include "config.h"

namespace flash_attn::sm80 {

// shared_bytes: what the device grants one block. Slot counts and scratch in the parameters are filled in by the
// launchers' callers as far as they depend on the tile shape, see backward_tile().
template <typename Element, typename Variant>
void launch_forward(ForwardParams params, int shared_bytes, cudaStream_t stream);

template <typename Element, typename Variant>
void launch_backward(const BackwardParams& params, int shared_bytes, cudaStream_t stream);

// Gradients of one number per (sequence, head) from parts per (head, slot, part): a fixed order, so the same bits.
struct PartialSumParams {
  RowLayout layout;
  int batch, heads, tile_rows, slots, parts;  // slots of one head, parts of one slot
  const float* partial;
  float* total;  // (batch, heads)
};

void launch_partial_sum(const PartialSumParams& params, cudaStream_t stream);

template <typename Params>
void launch(void (*kernel)(Params), std::atomic<uint64_t>& prepared_devices, int64_t blocks, int threads,
            int shared_bytes, cudaStream_t stream, const Params& params) {
  if (blocks == 0) return;
  if (blocks > INT_MAX) throw std::runtime_error("batch * heads * seqlen is too large for one launch");
  int device = 0;
  FLASH_ATTN_CUDA_CHECK(cudaGetDevice(&device));
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (shared_bytes > 48 * 1024 && (prepared_devices.load(std::memory_order_relaxed) & bit) == 0) {
    FLASH_ATTN_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    prepared_devices.fetch_or(bit, std::memory_order_relaxed);
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(params);
  FLASH_ATTN_CUDA_CHECK(cudaGetLastError());
}

// Starts a kernel; its permission to use much shared memory is asked for once for each device.
template <auto kKernel, typename Params>
void launch(int64_t blocks, int threads, int shared_bytes, cudaStream_t stream, const Params& params) {
  static std::atomic<uint64_t> prepared_devices{0};
  launch(kKernel, prepared_devices, blocks, threads, shared_bytes, stream, params);
}

}  // namespace flash_attn::sm80
