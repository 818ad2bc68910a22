// Host side of the backward: row sums, main kernel, conversion of dQ.
#pragma once

#include "backward.cuh"
#include "backward_rows.cuh"
#include "launch.h"

namespace flash_attn::sm80 {

template <typename Element, typename Variant>
void launch_backward(const BackwardParams& params, const LaunchTarget& target) {
  with_backward_config<Variant>(params.large_tiles, target.shared_bytes_per_block, [&]<typename Config>(Config) {
    const int64_t heads = params.shape.heads, kv_heads = heads / params.shape.heads_per_kv_head;
    const int64_t query_blocks = params.query_slots * heads;
    const int64_t key_blocks = params.key_slots * kv_heads * params.group_splits;
    launch<&backward_delta_kernel<Element, Config>>(query_blocks, Config::kThreads, 0, target, params);
    launch<&backward_kernel<Element, Config>>(key_blocks, Config::kThreads, Config::kSharedBytes, target, params);
    launch<&backward_dq_kernel<Element, Config>>(query_blocks, Config::kThreads, Config::QueryTile::kBytes, target,
                                                 params);
    launch_key_gradients<Element>(params, target);
  });
}

}  // namespace flash_attn::sm80
