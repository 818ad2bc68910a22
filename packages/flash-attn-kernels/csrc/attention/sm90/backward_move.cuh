// The warps of the backward that move data: one loads tiles, one for each consumer adds its part of dQ to the
// accumulator in global memory.
#pragma once

#include "../../ptx/bulk_copy.cuh"
#include "../../ptx/warpgroup.cuh"
#include "backward_params.h"
#include "backward_shared.cuh"
#include "backward_work.cuh"

namespace flash_attn::sm90 {

template <typename Tile>
__device__ __forceinline__ void load_panels(uint32_t tile, const CUtensorMap& map, uint32_t barrier, int row, int head,
                                            int matrix, ptx::CachePolicy policy) {
#pragma unroll
  for (int panel = 0; panel < Tile::kPanels; ++panel) {
    ptx::tma_load(tile + panel * Tile::kPanelBytes, map, barrier, panel * kPanelElements, row, head, matrix, policy);
  }
}

// One warp: hands out the block's works, and loads what they need.
template <typename Config>
__device__ __forceinline__ void load_backward(const BackwardKernelParams& params,
                                              const BackwardShared<Config>& shared) {
  using KeyTile = typename Config::KeyTile;
  using QueryTile = typename Config::QueryTile;
  constexpr int kVectorBytes = BackwardShared<Config>::kVectorBytes;
  const BackwardParams& attention = params.attention;
  const bool leads = threadIdx.x % 32 == 0;
  Cursor<Config::kWorkStages> cursor;
  Cursor<Config::kStages> query;
  Cursor<1> key;
  const auto publish = [&](int position) {
    if (leads) {
      shared.works.wait_empty(cursor);
      shared.storage->works[cursor.stage] = position;
      ptx::mbarrier_arrive(shared.works.full(cursor.stage));
    }
    cursor.advance();
  };
  int position = static_cast<int>(blockIdx.x);
  while (position < params.works) {
    publish(position);
    const BackwardWork<Config> work(attention, position);
    if (leads && work.visits() > 0) {
      const int query_matrix = attention.queries.cu_seqlens != nullptr ? 0 : work.sequence.index;
      const int key_matrix = attention.keys.cu_seqlens != nullptr ? 0 : work.sequence.index;
      const auto load_keys = [&](const auto& pipeline, uint32_t tile, const CUtensorMap& map) {
        pipeline.wait_empty(key);
        ptx::mbarrier_arrive_expecting(pipeline.full(0), KeyTile::kBytes);
        load_panels<KeyTile>(tile, map, pipeline.full(0), work.sequence.first_k + work.first_key, work.kv_head,
                             key_matrix, ptx::CachePolicy::kEvictFirst);
      };
      Visit visit = work.first();
      int remaining = work.visits();
      const auto load_queries = [&](const auto& pipeline, uint32_t tile, const CUtensorMap& map, uint32_t shared_vector,
                                    const float* global_vector) {
        const uint32_t barrier = pipeline.full(query.stage);
        pipeline.wait_empty(query);
        ptx::mbarrier_arrive_expecting(barrier, QueryTile::kBytes + kVectorBytes);
        load_panels<QueryTile>(tile, map, barrier, work.sequence.first_q + visit.tile * Config::kRows, visit.head,
                               query_matrix, ptx::CachePolicy::kEvictLast);
        ptx::bulk_load(shared_vector, global_vector + work.scratch_tile(attention, visit) * Config::kRows, kVectorBytes,
                       barrier);
      };
      bool first = true;
#pragma unroll 1
      for (; remaining > 0; --remaining) {
        load_queries(shared.queries, shared.query_tile(query.stage), params.maps.q, shared.lse(query.stage),
                     attention.lse_log2);
        load_queries(shared.douts, shared.dout_tile(query.stage), params.maps.dout, shared.delta(query.stage),
                     attention.delta);
        if (first) {  // so late because the work before has them for longer
          load_keys(shared.keys, shared.key_tile(), params.maps.k);
          load_keys(shared.values, shared.value_tile(), params.maps.v);
          key.advance();
          first = false;
        }
        query.advance();
        work.advance(visit);
      }
    }
    __syncwarp();
    if (leads) position = gridDim.x + atomicAdd(params.work_counter, 1);
    position = __shfl_sync(0xffffffffu, position, 0);
  }
  publish(kNoWork);
}

// One warp for each consumer.
template <typename Config>
__device__ __forceinline__ void add_query_gradients(const BackwardKernelParams& params,
                                                    const BackwardShared<Config>& shared, int consumer) {
  constexpr int kThreads = ptx::kWarpgroupThreads + 32;
  constexpr int kSliceFloats = Config::kQuerySliceBytes / 4;
  const BackwardParams& attention = params.attention;
  const bool leads = threadIdx.x % 32 == 0;
  Cursor<Config::kWorkStages> cursor;
  while (true) {
    const int position = shared.next_work(cursor);
    if (position == kNoWork) break;
    const BackwardWork<Config> work(attention, position);
    Visit visit = work.first();
#pragma unroll 1
    for (int remaining = work.visits(); remaining > 0; --remaining, work.advance(visit)) {
      ptx::named_barrier_arrive(kSliceEmpty + consumer, kThreads);
      ptx::named_barrier_wait(kSliceFull + consumer, kThreads);
      // Of a tile that ends early, the other consumer's rows may be all there are.
      const int row = visit.tile * Config::kRows + (Config::kDividesRows ? 64 * consumer : 0);
      if (leads && row < work.sequence.seqlen_q) {
        const int64_t slice = work.scratch_tile(attention, visit) * Config::kConsumers + consumer;
        ptx::bulk_add(attention.dq_accumulator + slice * kSliceFloats, shared.dq_slice(consumer),
                      Config::kQuerySliceBytes, ptx::CachePolicy::kEvictLast);
        ptx::bulk_commit();
        ptx::bulk_wait_read();
      }
      __syncwarp();
    }
  }
  if (leads) ptx::bulk_wait();
}

}  // namespace flash_attn::sm90
