// Row-wise work after the main backward kernel: one block per (head, tile of queries).
#pragma once

#include "../sm80/backward_rows.cuh"
#include "backward_config.h"
#include "store_rows.cuh"

namespace flash_attn::sm90 {

// dQ = scale * accumulator, rounded, from fragment order back to rows.
template <typename Element, typename Config>
__global__ void __launch_bounds__(Config::RowKernels::kThreads)
    backward_dq_kernel(const __grid_constant__ BackwardParams params) {
  const sm80::QueryTileWork work(params, Config::kRows);
  const int consumer = threadIdx.x / 128, thread = threadIdx.x % 128;
  const float4* slice = reinterpret_cast<const float4*>(params.dq_accumulator) +
                        (work.scratch_tile * Config::kConsumers + consumer) * (Config::kQuerySliceBytes / 16);
  const int stored = stored_rows(params.queries, params.shape.batch, work.index);
  const int row = work.first_query + (Config::kDividesRows ? 64 * consumer : 0) + thread / 32 * 16 + thread % 32 / 4;
  float dq[Config::kQueryFragments][4];
#pragma unroll
  for (int j = 0; j < Config::kQueryFragments; ++j) {
    const float4 fragment = row < stored ? slice[j * 128 + thread] : make_float4(0.f, 0.f, 0.f, 0.f);
    dq[j][0] = fragment.x * params.softmax_scale, dq[j][1] = fragment.y * params.softmax_scale;
    dq[j][2] = fragment.z * params.softmax_scale, dq[j][3] = fragment.w * params.softmax_scale;
  }
  const int first_column = Config::kDividesRows ? 0 : 64 * consumer;
  uint16_t* matrix = matrix_of(params.dq, work.index, first_row(params.queries, work.index), work.head);
  store_rows<Element>(dq, matrix + first_column, params.dq.row_stride, row, {stored, stored},
                      params.shape.head_dim - first_column, thread % 32);
}

}  // namespace flash_attn::sm90
