// Host side of the Hopper backward: row sums, main kernel, conversion of dQ.
#pragma once

#include <algorithm>
#include <climits>
#include <stdexcept>
#include <type_traits>

#include "../launch.h"
#include "../sm80/key_gradients.cuh"
#include "backward.cuh"
#include "backward_launch.h"
#include "backward_rows.cuh"
#include "tensor_map.h"

namespace flash_attn::sm90 {

template <typename Config>
BackwardMaps backward_maps(const BackwardParams& params, bool bfloat16) {
  const ProblemShape& shape = params.shape;
  const int matrices = params.queries.cu_seqlens == nullptr ? shape.batch : 1;
  const int key_matrices = params.keys.cu_seqlens == nullptr ? shape.batch : 1;
  const int kv_heads = shape.heads / shape.heads_per_kv_head;
  const auto map = [&](const TensorView& view, int head_dim, int rows, int heads, int count, int box_rows) {
    return tensor_map(view, {head_dim, rows, heads, count}, box_rows, bfloat16);
  };
  BackwardMaps maps;
  maps.k = map(params.k, shape.head_dim, params.keys.rows, kv_heads, key_matrices, Config::kColumns);
  maps.v = map(params.v, shape.head_dim_v, params.keys.rows, kv_heads, key_matrices, Config::kColumns);
  if (params.queries.rows > 0) {
    maps.q = map(params.q, shape.head_dim, params.queries.rows, shape.heads, matrices, Config::kRows);
    maps.dout = map(params.dout, shape.head_dim_v, params.queries.rows, shape.heads, matrices, Config::kRows);
  } else {
    maps.q = maps.dout = maps.k;  // valid, and not used
  }
  return maps;
}

template <typename Element, typename Dims>
void launch_backward(const BackwardParams& params, int* work_counter, const LaunchTarget& target) {
  using Config = typename BackwardConfigOf<Dims>::Config;
  using RowKernels = typename Config::RowKernels;
  const int64_t heads = params.shape.heads, kv_heads = heads / params.shape.heads_per_kv_head;
  const int64_t query_blocks = params.query_slots * heads;
  const int64_t works = params.keys.rows == 0 ? 0 : params.key_slots * kv_heads * params.group_splits;
  if (works > INT_MAX / 2) throw std::runtime_error("batch * heads * seqlen is too large for one launch");
  launch<&sm80::backward_delta_kernel<Element, RowKernels, true>>(query_blocks, RowKernels::kThreads, 0, target,
                                                                  params);
  if (works > 0) {
    const BackwardMaps maps = backward_maps<Config>(params, std::is_same_v<Element, __nv_bfloat16>);
    launch<&backward_kernel<Element, Config>>(
        std::min<int64_t>(target.multiprocessors, works), Config::kThreads, BackwardShared<Config>::kBytes, target,
        BackwardKernelParams{maps, params, static_cast<int>(works), work_counter});
  }
  launch<&backward_dq_kernel<Element, Config>>(query_blocks, RowKernels::kThreads, 0, target, params);
  sm80::launch_key_gradients<Element>(params, target);
#ifdef FLASH_ATTN_BOUNDED_SPINS
  ptx::throw_if_spins_ended(target.stream);
#endif
}

}  // namespace flash_attn::sm90
