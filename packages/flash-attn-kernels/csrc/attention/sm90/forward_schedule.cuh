// The warp of a block that decides what it computes.
#pragma once

#include <cmath>

#include "../../ptx/special_registers.cuh"
#include "../shared_tile.cuh"
#include "forward_params.h"
#include "forward_shared.cuh"

namespace flash_attn::sm90 {

// What queries that see no key get. A warp.
__device__ __forceinline__ void store_empty_rows(const ForwardParams& params, const ForwardWork& work, int end) {
  const int lane = threadIdx.x % 32, chunks = params.shape.head_dim_v / kChunkElements;
  const bool has_sink = params.learnable_sink != nullptr;
  uint16_t* out = matrix_of(params.out, work.sequence.index, work.sequence.first_q, work.head);
  float* lse = params.lse + lse_offset(params, work.sequence, work.head);
#pragma unroll 1
  for (int row = work.first_query; row < end; ++row) {
    if (lane < chunks) reinterpret_cast<uint4*>(out + row * params.out.row_stride)[lane] = make_uint4(0, 0, 0, 0);
    if (lane == 0) {
      lse[row] = has_sink && row < work.sequence.seqlen_q ? params.learnable_sink[work.head] : -INFINITY;
    }
  }
}

// Describes the block's tiles one after the other, the next one when it is asked for.
template <typename Config>
__device__ __forceinline__ void schedule(const ForwardKernelParams& params, const ForwardShared<Config>& shared) {
  const int lane = threadIdx.x % 32;
  const int blocks = gridDim.x, tiles = params.order.tiles();
  Cursor<Config::kWorkStages> cursor;
  Cursor<1> request;
  int position = ptx::block_index();
  for (int round = 1; position < tiles; ++round) {
    const ForwardWork work = work_at<Config>(params, position);
    if (work.range.begin < work.range.end) {
      shared.works.wait_empty(cursor);
      if (lane == 0) shared.storage->works[cursor.stage] = work;
      if (lane < Config::kConsumers) {
        shared.storage->ranges[cursor.stage][lane] =
            visible_key_tiles(work.sequence, params.attention.window, work.first_query + Config::kConsumerRows * lane,
                              Config::kConsumerRows, Config::kColumns);
      }
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(shared.works.full(cursor.stage));
      cursor.advance();
      shared.requests.wait_full(request);
      request.advance();
    } else {
      store_empty_rows(params.attention, work, min(work.first_query + Config::kRows, work.stored));
    }
    if (params.tile_counter == nullptr) {
      position = static_position(ptx::block_index(), blocks, round);
    } else {
      if (lane == 0) position = blocks + atomicAdd(params.tile_counter, 1);
      position = __shfl_sync(0xffffffffu, position, 0);
    }
  }
  shared.works.wait_empty(cursor);
  if (lane == 0) {
    shared.storage->works[cursor.stage].head = ForwardWork::kNone;
    ptx::mbarrier_arrive(shared.works.full(cursor.stage));
  }
}

}  // namespace flash_attn::sm90
