// Row-wise work before and after the main backward kernel: one block per (head, tile of queries).
#pragma once

#include <cmath>

#include "../params.h"
#include "../score_modifiers.cuh"
#include "../sequence.cuh"
#include "../shared_tile.cuh"
#include "../tile_copy.cuh"
#include "config.h"
#include "dq_accumulator.cuh"

namespace flash_attn::sm80 {

struct QueryTileWork {
  int head, index, first_query;
  int64_t scratch_tile;

  __device__ __forceinline__ QueryTileWork(const BackwardParams& params, int rows) {
    const int block = static_cast<int>(blockIdx.x);
    const Slot slot(params.queries, params.shape.batch, rows, block % params.query_slots);
    head = block / params.query_slots;
    index = slot.index;
    first_query = slot.tile * rows;
    scratch_tile = block;
  }
};

// Eight elements of out times eight of dout, added up.
template <typename Element, bool kAligned>
__device__ __forceinline__ float dot_chunk(const uint16_t* out, const uint16_t* dout, int count) {
  float sum = 0.f;
  if constexpr (kAligned) {
    const uint4 o = *reinterpret_cast<const uint4*>(out), d = *reinterpret_cast<const uint4*>(dout);
    const uint32_t o_pairs[4] = {o.x, o.y, o.z, o.w}, d_pairs[4] = {d.x, d.y, d.z, d.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 a = ptx::unpack<Element>(o_pairs[i]), b = ptx::unpack<Element>(d_pairs[i]);
      sum = fmaf(a.x, b.x, fmaf(a.y, b.y, sum));
    }
  } else {
    for (int i = 0; i < min(count, kChunkElements); ++i) {
      sum = fmaf(ptx::unpack<Element>(out[i]).x, ptx::unpack<Element>(dout[i]).x, sum);
    }
  }
  return sum;
}

// delta = rowsum(dO * O) - dLSE, and LSE in base 2. Rows that see nothing, and rows past the end of the sequence, get
// LSE = +inf: their probabilities then come out as exactly 0. The sink's gradient is -sum exp(sink - LSE) * delta.
// kClears: the tile of the dQ accumulator becomes zero, by writes that run beside the reads.
template <typename Element, typename Config, bool kClears = false>
__global__ void __launch_bounds__(Config::kThreads)
    backward_delta_kernel(const __grid_constant__ BackwardParams params) {
  constexpr int kRowsPerPass = Config::kThreads / kPanelChunks;
  const QueryTileWork work(params, Config::kRows);
  if constexpr (kClears) {
    constexpr int kChunks = Config::kRows * Config::kHeadDim / 4;
    float4* tile = reinterpret_cast<float4*>(params.dq_accumulator) + work.scratch_tile * kChunks;
#pragma unroll
    for (int i = 0; i < kChunks; i += Config::kThreads) tile[i + threadIdx.x] = make_float4(0.f, 0.f, 0.f, 0.f);
  }
  const Sequence sequence(params, work.index);
  const int chunk = threadIdx.x % kPanelChunks;
  const uint16_t* out = matrix_of(params.out, work.index, sequence.first_q, work.head);
  const uint16_t* dout = matrix_of(params.dout, work.index, sequence.first_q, work.head);
  const int64_t first_lse = lse_offset(params, sequence, work.head);
  const float sink = params.learnable_sink == nullptr ? -INFINITY : params.learnable_sink[work.head];
  float sink_gradient = 0.f;
#pragma unroll
  for (int pass = 0; pass < (Config::kRows + kRowsPerPass - 1) / kRowsPerPass; ++pass) {
    const int tile_row = pass * kRowsPerPass + threadIdx.x / kPanelChunks;
    if (tile_row >= Config::kRows) break;  // whole warps: eight threads share a row
    const int row = work.first_query + tile_row;
    const bool exists = row < sequence.seqlen_q;
    float delta = 0.f;
#pragma unroll
    for (int column = chunk * kChunkElements; column < Config::kHeadDimV; column += kPanelElements) {
      if (exists && column < params.shape.head_dim_v) {
        delta += dot_chunk<Element, !Config::kGeneral>(out + row * params.out.row_stride + column,
                                                       dout + row * params.dout.row_stride + column,
                                                       params.shape.head_dim_v - column);
      }
    }
#pragma unroll
    for (int offset = kPanelChunks / 2; offset > 0; offset /= 2) {
      delta += __shfl_xor_sync(0xffffffffu, delta, offset);
    }
    if (chunk == 0) {
      const float lse = exists ? params.lse[first_lse + row] : -INFINITY;
      if (exists && params.dlse != nullptr) delta -= params.dlse[first_lse + row];
      const bool empty = lse == -INFINITY;
      params.lse_log2[work.scratch_tile * Config::kRows + tile_row] = empty ? INFINITY : lse * kLog2e;
      params.delta[work.scratch_tile * Config::kRows + tile_row] = empty ? 0.f : delta;
      if (!empty) sink_gradient -= ptx::exp2((sink - lse) * kLog2e) * delta;
    }
  }
  if (params.sink_partial == nullptr) return;
  __shared__ float warp_sums[Config::kWarps];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sink_gradient += __shfl_xor_sync(0xffffffffu, sink_gradient, offset);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sink_gradient;
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0.f;
    for (int warp = 0; warp < Config::kWarps; ++warp) sum += warp_sums[warp];
    params.sink_partial[work.scratch_tile] = sum;
  }
}

// dQ = scale * accumulator, rounded, from fragment order back to rows.
template <typename Element, typename Config>
__global__ void __launch_bounds__(Config::kThreads) backward_dq_kernel(const __grid_constant__ BackwardParams params) {
  const QueryTileWork work(params, Config::kRows);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;

  extern __shared__ __align__(1024) uint8_t shared_memory[];
  const typename Config::QueryTile tile{ptx::shared_address(shared_memory)};
  float dq[Config::kQueryRowTiles][Config::kQueryColumnTiles][4];
  load_from_accumulator<Config::kThreads>(
      dq, params.dq_accumulator + work.scratch_tile * (Config::kRows * Config::kHeadDim), thread);
#pragma unroll
  for (int i = 0; i < Config::kQueryRowTiles; ++i)
#pragma unroll
    for (int j = 0; j < Config::kQueryColumnTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) dq[i][j][e] *= params.softmax_scale;
  store_fragments<Element>(tile, dq, warp % Config::kQueryWarps * 16 * Config::kQueryRowTiles,
                           warp / Config::kQueryWarps * 8 * Config::kQueryColumnTiles, lane);
  __syncthreads();
  store_tile<Config::kThreads, Config::kRows, !Config::kGeneral>(
      tile, matrix_of(params.dq, work.index, first_row(params.queries, work.index), work.head), params.dq.row_stride, 0,
      work.first_query, stored_rows(params.queries, params.shape.batch, work.index), params.shape.head_dim, thread);
}

}  // namespace flash_attn::sm80
