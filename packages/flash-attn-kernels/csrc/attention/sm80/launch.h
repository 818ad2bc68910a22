// The launchers that the generated instantiations provide, and how they start a kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../../api/cuda_check.h"
#include "../params.h"

namespace flash_attn::sm80 {

template <typename Element, int kHeadDim>
void launch_forward(const ForwardParams& params, cudaStream_t stream);

template <typename Element, int kHeadDim>
void launch_backward(const BackwardParams& params, int shared_bytes, cudaStream_t stream);

template <typename Params>
void launch(void (*kernel)(Params), int64_t blocks, int threads, int shared_bytes, cudaStream_t stream,
            const Params& params) {
  if (blocks == 0) return;
  if (shared_bytes > 48 * 1024) {
    FLASH_ATTN_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(params);
  FLASH_ATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace flash_attn::sm80
