// The thread of a block that starts all copies to shared memory.
#pragma once

#include "../../ptx/tma.cuh"
#include "../shared_tile.cuh"
#include "forward_params.h"
#include "forward_shared.cuh"

namespace flash_attn::sm90 {

// Loads rows from `row` on, panel by panel. The barrier gets the arrival that it waits for, and the bytes.
template <typename Tile>
__device__ __forceinline__ void load_tile(uint32_t tile, const CUtensorMap& map, uint32_t barrier, int row, int head,
                                          int batch, ptx::CachePolicy policy) {
  ptx::mbarrier_arrive_expecting(barrier, Tile::kBytes);
#pragma unroll
  for (int panel = 0; panel < Tile::kPanels; ++panel) {
    ptx::tma_load(tile + panel * Tile::kPanelBytes, map, barrier, panel * kPanelElements, row, head, batch, policy);
  }
}

// How many tiles of keys before the end of a tile the next one is asked for. So long is enough to find out what it is;
// the later, the more evenly are tiles shared out that differ in length.
constexpr int kRequestDistance = 3;

template <typename Config>
__device__ __forceinline__ void load(const ForwardKernelParams& params, const ForwardShared<Config>& shared) {
  const bool packed = params.attention.queries.cu_seqlens != nullptr;
  const bool packed_keys = params.attention.keys.cu_seqlens != nullptr;
  Cursor<Config::kWorkStages> cursor;
  Cursor<Config::kQueryStages> query;
  Cursor<Config::kStages> key, value;
  while (true) {
    shared.works.wait_full(cursor);
    const ForwardWork& work = shared.storage->works[cursor.stage];
    const int head = work.head;
    if (head == ForwardWork::kNone) return;
    const int kv_head = head / params.attention.shape.heads_per_kv_head;
    const int query_matrix = packed ? 0 : work.sequence.index, key_matrix = packed_keys ? 0 : work.sequence.index;
    const int first_query = work.sequence.first_q + work.first_query, first_key = work.sequence.first_k;
    const int begin = work.range.begin, end = work.range.end;
    shared.works.release(cursor);
    cursor.advance();

    const auto load_keys = [&](int n) {
      shared.keys.wait_empty(key);
      load_tile<typename Config::KeyTile>(shared.key_tile(key.stage), params.maps.k, shared.keys.full(key.stage),
                                          first_key + n * Config::kColumns, kv_head, key_matrix,
                                          ptx::CachePolicy::kEvictLast);
      key.advance();
    };
    const auto load_values = [&](int n) {
      shared.values.wait_empty(value);
      load_tile<typename Config::ValueTile>(shared.value_tile(value.stage), params.maps.v,
                                            shared.values.full(value.stage), first_key + n * Config::kColumns, kv_head,
                                            key_matrix, ptx::CachePolicy::kEvictLast);
      value.advance();
    };
    load_keys(end - 1);  // while the consumers may still have the queries before
    shared.queries.wait_empty(query);
    load_tile<typename Config::QueryTile>(shared.query_tile(query.stage), params.maps.q,
                                          shared.queries.full(query.stage), first_query, head, query_matrix,
                                          ptx::CachePolicy::kEvictFirst);
    query.advance();
    const int requesting = min(end - 1, begin + kRequestDistance);
    for (int n = end - 1; n >= begin; --n) {
      if (n == requesting) ptx::mbarrier_arrive(shared.requests.full(0));
      if (n > begin) load_keys(n - 1);
      load_values(n);
    }
  }
}

}  // namespace flash_attn::sm90
