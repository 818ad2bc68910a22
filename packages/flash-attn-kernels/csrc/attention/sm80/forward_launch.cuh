// Host side of the forward kernel.
#pragma once

#include "forward.cuh"
#include "launch.h"

namespace flash_attn::sm80 {

template <typename Element, typename Variant>
void launch_forward(ForwardParams params, int shared_bytes, cudaStream_t stream) {
  with_forward_config<Variant>(shared_bytes, [&]<typename Config>(Config) {
    params.query_slots = slot_count(params.queries, params.shape.batch, Config::kRows);
    launch<&forward_kernel<Element, Config>>(static_cast<int64_t>(params.query_slots) * params.shape.heads,
                                             Config::kThreads, Config::kSharedBytes, stream, params);
  });
}

}  // namespace flash_attn::sm80
