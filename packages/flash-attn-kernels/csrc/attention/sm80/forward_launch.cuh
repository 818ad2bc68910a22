// Host side of the forward kernel.
#pragma once

#include <cuda_runtime.h>

#include "../../api/cuda_check.h"
#include "forward.cuh"
#include "launch.h"

namespace flash_attn::sm80 {

template <typename Element, int kHeadDim>
void launch_forward(const ForwardParams& params, cudaStream_t stream) {
  using Config = ForwardConfig<kHeadDim>;
  const int64_t tiles = ceil_div(params.shape.seqlen_q, Config::kRows);
  const int64_t blocks = tiles * params.shape.heads * params.shape.batch;
  launch(&forward_kernel<Element, Config>, blocks, Config::kThreads, Config::kSharedBytes, stream, params);
}

}  // namespace flash_attn::sm80
