// Host side of the backward: row sums, main kernel, conversion of dQ.
#pragma once

#include <cuda_runtime.h>

#include "backward.cuh"
#include "backward_rows.cuh"
#include "launch.h"

namespace flash_attn::sm80 {

template <typename Element, typename Config>
void launch_backward_config(const BackwardParams& params, cudaStream_t stream) {
  const ProblemShape& shape = params.shape;
  const int64_t query_blocks = static_cast<int64_t>(params.query_tiles) * shape.heads * shape.batch;
  const int64_t key_blocks = static_cast<int64_t>(ceil_div(shape.seqlen_k, Config::kColumns)) *
                             (shape.heads / shape.heads_per_kv_head) * shape.batch;
  constexpr int kRowBytes = Config::kRows * Config::kHeadDim * 2;
  launch(&backward_delta_kernel<Element, Config>, query_blocks, Config::kThreads, 0, stream, params);
  launch(&backward_kernel<Element, Config>, key_blocks, Config::kThreads, Config::kSharedBytes, stream, params);
  launch(&backward_dq_kernel<Element, Config>, query_blocks, Config::kThreads, kRowBytes, stream, params);
}

template <typename Element, int kHeadDim>
void launch_backward(const BackwardParams& params, int shared_bytes, cudaStream_t stream) {
  using Configs = BackwardConfigs<kHeadDim>;
  if (shared_bytes >= Configs::Large::kSharedBytes) {
    launch_backward_config<Element, typename Configs::Large>(params, stream);
  } else {
    launch_backward_config<Element, typename Configs::Small>(params, stream);
  }
}

}  // namespace flash_attn::sm80
