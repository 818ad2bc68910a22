// Row-wise work before and after the main backward kernel: one block per (batch, head, tile of queries).
#pragma once

#include <cmath>

#include "../params.h"
#include "../shared_tile.cuh"
#include "../visible_range.cuh"
#include "config.h"
#include "dq_accumulator.cuh"

namespace flash_attn::sm80 {

struct QueryTileWork {
  int batch, head, first_query;
  int64_t scratch_tile;

  __device__ __forceinline__ QueryTileWork(const BackwardParams& params, int rows) {
    const int tiles = params.query_tiles, block = static_cast<int>(blockIdx.x);
    first_query = block % tiles * rows;
    head = block / tiles % params.shape.heads;
    batch = block / tiles / params.shape.heads;
    scratch_tile = blockIdx.x;
  }
};

// delta = rowsum(dO * O) - dLSE, and LSE in base 2. Rows that see nothing, and rows past the end of the tile, get
// LSE = +inf: their probabilities then come out as exactly 0.
template <typename Element, typename Config>
__global__ void __launch_bounds__(Config::kThreads)
    backward_delta_kernel(const __grid_constant__ BackwardParams params) {
  constexpr int kLanesPerRow = Config::kHeadDim / kChunkElements;
  constexpr int kRowsPerPass = Config::kThreads / kLanesPerRow;
  const ProblemShape& shape = params.shape;
  const QueryTileWork work(params, Config::kRows);
  const int chunk = threadIdx.x % kLanesPerRow;
  const uint16_t* out = matrix_of(params.out, work.batch, work.head) + chunk * kChunkElements;
  const uint16_t* dout = matrix_of(params.dout, work.batch, work.head) + chunk * kChunkElements;
  const int64_t first_lse = (static_cast<int64_t>(work.batch) * shape.heads + work.head) * shape.seqlen_q;
#pragma unroll
  for (int pass = 0; pass < Config::kRows / kRowsPerPass; ++pass) {
    const int tile_row = pass * kRowsPerPass + threadIdx.x / kLanesPerRow;
    const int row = work.first_query + tile_row;
    const bool exists = row < shape.seqlen_q;
    float delta = 0.f;
    if (exists) {
      const uint4 o = *reinterpret_cast<const uint4*>(out + row * params.out.row_stride);
      const uint4 d = *reinterpret_cast<const uint4*>(dout + row * params.dout.row_stride);
      const uint32_t o_pairs[4] = {o.x, o.y, o.z, o.w}, d_pairs[4] = {d.x, d.y, d.z, d.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 a = ptx::unpack<Element>(o_pairs[i]), b = ptx::unpack<Element>(d_pairs[i]);
        delta = fmaf(a.x, b.x, fmaf(a.y, b.y, delta));
      }
    }
#pragma unroll
    for (int offset = kLanesPerRow / 2; offset > 0; offset /= 2) {
      delta += __shfl_xor_sync(0xffffffffu, delta, offset);
    }
    if (chunk == 0) {
      const float lse = exists ? params.lse[first_lse + row] : -INFINITY;
      if (exists && params.dlse != nullptr) delta -= params.dlse[first_lse + row];
      const bool empty = lse == -INFINITY;
      params.lse_log2[work.scratch_tile * Config::kRows + tile_row] = empty ? INFINITY : lse * 1.4426950408889634f;
      params.delta[work.scratch_tile * Config::kRows + tile_row] = empty ? 0.f : delta;
    }
  }
}

// dQ = scale * accumulator, rounded, from fragment order back to rows.
template <typename Element, typename Config>
__global__ void __launch_bounds__(Config::kThreads) backward_dq_kernel(const __grid_constant__ BackwardParams params) {
  using QueryTile = SharedTile<Config::kRows, Config::kHeadDim>;
  const ProblemShape& shape = params.shape;
  const QueryTileWork work(params, Config::kRows);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;

  extern __shared__ __align__(1024) uint8_t shared_memory[];
  const QueryTile tile{ptx::shared_address(shared_memory)};
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
  store_tile<Config::kThreads, Config::kRows>(tile, matrix_of(params.dq, work.batch, work.head), params.dq.row_stride,
                                              0, work.first_query, shape.seqlen_q, thread);
}

}  // namespace flash_attn::sm80
