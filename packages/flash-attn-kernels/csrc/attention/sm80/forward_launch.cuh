// Host side of the forward kernel.
#pragma once

#include "forward.cuh"
#include "launch.h"

namespace flash_attn::sm80 {

template <typename Element, typename Variant>
void launch_forward(ForwardParams params, const LaunchTarget& target) {
  with_forward_config<Variant>(target.shared_bytes_per_block, [&]<typename Config>(Config) {
    params.query_slots = slot_count(params.queries, params.shape.batch, Config::kRows);
    launch<&forward_kernel<Element, Config>>(static_cast<int64_t>(params.query_slots) * params.shape.heads,
                                             Config::kThreads, Config::kSharedBytes, target, params);
  });
}

}  // namespace flash_attn::sm80
