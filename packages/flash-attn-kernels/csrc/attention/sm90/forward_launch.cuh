// Host side of the Hopper forward kernel.
#pragma once

#include <algorithm>
#include <type_traits>

#include "forward.cuh"
#include "launch.h"
#include "tensor_map.h"
#include "tile_order.h"

namespace flash_attn::sm90 {

template <typename Config>
TensorMaps tensor_maps(const ForwardParams& params, bool bfloat16) {
  const ProblemShape& shape = params.shape;
  const int matrices = params.queries.cu_seqlens == nullptr ? shape.batch : 1;
  const int key_matrices = params.keys.cu_seqlens == nullptr ? shape.batch : 1;
  const int kv_heads = shape.heads / shape.heads_per_kv_head;
  TensorMaps maps;
  maps.q = tensor_map(params.q, {shape.head_dim, params.queries.rows, shape.heads, matrices}, Config::kRows, bfloat16);
  if (params.keys.rows > 0 && key_matrices > 0) {
    maps.k =
        tensor_map(params.k, {shape.head_dim, params.keys.rows, kv_heads, key_matrices}, Config::kColumns, bfloat16);
    maps.v =
        tensor_map(params.v, {shape.head_dim_v, params.keys.rows, kv_heads, key_matrices}, Config::kColumns, bfloat16);
  } else {
    maps.k = maps.v = maps.q;  // valid, and not used
  }
  return maps;
}

template <typename Element, typename Dims, bool kSoftcap>
void launch_forward(const ForwardParams& params, int* tile_counter, const LaunchTarget& target) {
  using Config = typename ForwardConfigOf<Dims, kSoftcap>::Config;
  const TileOrder order = tile_order(params, Config::kRows, target.multiprocessors);
  if (order.tiles() == 0 || params.queries.rows == 0) return;
  const ForwardKernelParams kernel_params{tensor_maps<Config>(params, std::is_same_v<Element, __nv_bfloat16>), params,
                                          order, tile_counter};
  launch<&forward_kernel<Element, Config, kSoftcap>>(std::min(target.multiprocessors, order.tiles()), Config::kThreads,
                                                     ForwardShared<Config>::kBytes, target, kernel_params);
#ifdef FLASH_ATTN_BOUNDED_SPINS
  ptx::throw_if_spins_ended(target.stream);
#endif
}

}  // namespace flash_attn::sm90
