// A warpgroup of a backward block that computes for 64 keys.
#pragma once

#include "../../ptx/shared_memory.cuh"
#include "../../ptx/stmatrix.cuh"
#include "../../ptx/warpgroup.cuh"
#include "backward_mask.cuh"
#include "backward_params.h"
#include "backward_shared.cuh"
#include "backward_work.cuh"
#include "store_rows.cuh"
#include "warpgroup_gemm.cuh"

namespace flash_attn::sm90 {

// Rows of a tile past the end of a sequence may hold anything, which times 0 need not be 0. Every consumer clears all
// of them, so that none has to wait for another.
template <typename Tile>
__device__ __forceinline__ void clear_tail(uint32_t base, int first, int consumer) {
  const Tile tile{base};
  const int thread = threadIdx.x % ptx::kWarpgroupThreads;
#pragma unroll 1
  for (int row = first + thread / kPanelChunks; row < Tile::kRows; row += ptx::kWarpgroupThreads / kPanelChunks) {
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      ptx::store_shared_16(tile.chunk_address(row, panel * kPanelChunks + thread % kPanelChunks), {0u, 0u, 0u, 0u});
    }
  }
  ptx::fence_async_proxy();
  ptx::named_barrier_wait(kTailCleared + consumer, ptx::kWarpgroupThreads);
}

// dQ of one consumer: its 64 rows, or its 64 columns, of dS K.
template <typename Element, typename Config>
__device__ __forceinline__ void multiply_keys(float (&dq)[Config::kQueryFragments][4], uint64_t ds, uint64_t keys) {
  using ScoreTile = typename Config::ScoreTile;
  constexpr int kPanelSteps = kPanelElements / kDepth;
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < Config::kColumns / kDepth; ++k) {
    const uint64_t step_ds = ds + (k / kPanelSteps * ScoreTile::kPanelBytes + k % kPanelSteps * kDepth * 2) / 16;
    const uint64_t step_keys = keys + k * kDepth * kRowBytes / 16;
    if (k == 0) {
      ptx::Wgmma<64>::template ss<Element, true, false>(dq, step_ds, step_keys);
    } else {
      ptx::Wgmma<64>::template ss<Element, true, true>(dq, step_ds, step_keys);
    }
  }
}

__device__ __forceinline__ float2 load_shared_pair(uint32_t address) {
  float2 value;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "r"(address) : "memory");
  return value;
}

// Fragments of 16 keys of a warp as fp32 parts, (splits, key rows, kv heads, head_dim), contiguous. The rows of a dense
// call count through. `key` is the thread's first.
template <typename Config>
__device__ __forceinline__ void store_part(const BackwardParams& params, const BackwardWork<Config>& work, float* parts,
                                           const float (&fragments)[Config::kHeadDim / 8][4], int key, int stored,
                                           int head_dim, int lane) {
  const bool dense = params.keys.cu_seqlens == nullptr;
  const int kv_heads = params.shape.heads / params.shape.heads_per_kv_head;
  const int64_t rows = static_cast<int64_t>(params.keys.rows) * (dense ? params.shape.batch : 1);
  const int64_t first = work.split * rows +
                        (dense ? static_cast<int64_t>(work.sequence.index) * params.keys.rows : work.sequence.first_k);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (key + 8 * half >= stored) continue;
    float* target = parts + ((first + key + 8 * half) * kv_heads + work.kv_head) * head_dim;
#pragma unroll
    for (int j = 0; j < Config::kHeadDim / 8; ++j) {
      const int d = 8 * j + 2 * (lane % 4);
      if (d < head_dim) {
        *reinterpret_cast<float2*>(target + d) = make_float2(fragments[j][2 * half], fragments[j][2 * half + 1]);
      }
    }
  }
}

template <typename Element, typename Config>
__device__ __forceinline__ void store_key_gradients(const BackwardParams& params, const BackwardWork<Config>& work,
                                                    float (&dk)[Config::kHeadDim / 8][4],
                                                    const float (&dv)[Config::kHeadDim / 8][4], int tile_key,
                                                    int lane) {
#pragma unroll
  for (int j = 0; j < Config::kHeadDim / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) dk[j][e] *= params.softmax_scale;
  }
  const Sequence& sequence = work.sequence;
  const int stored = stored_rows(params.keys, params.shape.batch, sequence.index);
  const int key = work.first_key + tile_key + lane / 4;
  if (params.dk_partial != nullptr) {
    store_part(params, work, params.dv_partial, dv, key, stored, params.shape.head_dim_v, lane);
    store_part(params, work, params.dk_partial, dk, key, stored, params.shape.head_dim, lane);
    return;
  }
  const auto store = [&](const TensorView& gradient, const auto& fragments, int head_dim) {
    store_rows<Element>(fragments, matrix_of(gradient, sequence.index, sequence.first_k, work.kv_head),
                        gradient.row_stride, key, {sequence.seqlen_k, stored}, head_dim, lane);
  };
  store(params.dv, dv, params.shape.head_dim_v);
  store(params.dk, dk, params.shape.head_dim);
}

template <typename Element, typename Config>
__device__ __forceinline__ void consume_backward(const BackwardKernelParams& params,
                                                 const BackwardShared<Config>& shared, int consumer) {
  using KeyTile = typename Config::KeyTile;
  using QueryTile = typename Config::QueryTile;
  using ScoreTile = typename Config::ScoreTile;
  constexpr int kRows = Config::kRows, kScoreTiles = kRows / 8, kSteps = kRows / kDepth;
  constexpr int kConsumerThreads = ptx::kWarpgroupThreads * Config::kConsumers;
  constexpr int kSliceThreads = ptx::kWarpgroupThreads + 32;
  constexpr int kConsumerBytes = Config::kConsumerColumns * kRowBytes;
  const BackwardParams& attention = params.attention;
  const int thread = threadIdx.x % ptx::kWarpgroupThreads, lane = thread % 32;
  const int tile_key = Config::kConsumerColumns * consumer + thread / 32 * 16;  // of the warp
  const bool signals = thread == 0;  // for all, since products end for the whole warpgroup at once
  const bool ragged_queries = has_rows_behind(attention.queries), ragged_keys = has_rows_behind(attention.keys);
  const uint64_t key_rows = row_descriptor(shared.key_tile() + consumer * kConsumerBytes);
  const uint64_t value_rows = row_descriptor(shared.value_tile() + consumer * kConsumerBytes);
  const uint64_t key_panels =
      panel_descriptor<KeyTile>(shared.key_tile() + (Config::kDividesRows ? 0 : consumer * KeyTile::kPanelBytes));
  const uint32_t ds_lane = (lane % 8 + 8 * (lane / 16)) * kRowBytes +
                           (((tile_key % kPanelElements / 8 + lane / 8 % 2) ^ (lane % 8)) * 16) +
                           consumer * ScoreTile::kPanelBytes;
  Cursor<Config::kWorkStages> work_cursor;
  Cursor<Config::kStages> cursor;
  Cursor<1> key_cursor;

  while (true) {
    const int position = shared.next_work(work_cursor);
    if (position == kNoWork) return;
    const BackwardWork<Config> work(attention, position);
    const Sequence& sequence = work.sequence;
    Visit visit = work.first();
    float dk[Config::kHeadDim / 8][4], dv[Config::kHeadDim / 8][4];
    clear(dk);
    clear(dv);

    const auto clear_queries = [&](uint32_t tile) {
      const int tail = sequence.seqlen_q - visit.tile * kRows;
      if (ragged_queries && tail < kRows) clear_tail<QueryTile>(tile, tail, consumer);
    };
    const auto clear_keys = [&](uint32_t tile) {
      const int tail = sequence.seqlen_k - work.first_key;
      if (ragged_keys && tail < Config::kColumns) clear_tail<KeyTile>(tile, tail, consumer);
    };
#pragma unroll 1
    for (int remaining = work.visits(); remaining > 0; --remaining) {
      const int stage = cursor.stage, first_query = visit.tile * kRows;
      float scores[kScoreTiles][4], ds[kScoreTiles][4];
      const bool is_first = visit.head == work.first_head && visit.tile == work.visible.begin;
      if (is_first) {
        shared.keys.wait_full(key_cursor);
        clear_keys(shared.key_tile());
      }
      shared.queries.wait_full(cursor);
      clear_queries(shared.query_tile(stage));
      multiply_rows<Element, KeyTile, QueryTile>(scores, key_rows, row_descriptor(shared.query_tile(stage)));
      ptx::wgmma_commit();
      if (is_first) {
        shared.values.wait_full(key_cursor);
        clear_keys(shared.value_tile());
      }
      shared.douts.wait_full(cursor);
      clear_queries(shared.dout_tile(stage));
      multiply_rows<Element, KeyTile, QueryTile>(ds, value_rows, row_descriptor(shared.dout_tile(stage)));
      ptx::wgmma_commit();

      ptx::wgmma_wait<1>();
      ptx::pin(scores);
      if (!is_clean(sequence, attention.window, first_query, kRows, work.first_key, Config::kColumns)) {
        const int key = work.first_key + tile_key + lane / 4, query = first_query + 2 * (lane % 4);
        if (attention.window.left == Window::kUnbounded) {
          mask_transposed<false>(scores, sequence, attention.window, key, query);
        } else {
          mask_transposed<true>(scores, sequence, attention.window, key, query);
        }
      }
      const uint32_t lse = shared.lse(stage) + lane % 4 * 8, delta = shared.delta(stage) + lane % 4 * 8;
#pragma unroll
      for (int j = 0; j < kScoreTiles; ++j) {
        const float2 pair = load_shared_pair(lse + j * 32);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          scores[j][e] = ptx::exp2(fmaf(scores[j][e], attention.softmax_scale_log2, e % 2 == 0 ? -pair.x : -pair.y));
        }
      }
      ptx::wgmma_wait<0>();
      ptx::pin(ds);
      if (remaining == 1 && signals) shared.values.release(key_cursor);
#pragma unroll
      for (int j = 0; j < kScoreTiles; ++j) {
        const float2 pair = load_shared_pair(delta + j * 32);
#pragma unroll
        for (int e = 0; e < 4; ++e) ds[j][e] = scores[j][e] * (ds[j][e] - (e % 2 == 0 ? pair.x : pair.y));
      }
      uint32_t p_operand[kSteps][4], ds_operand[kSteps][4];
      pack<Element>(p_operand, scores);
      pack<Element>(ds_operand, ds);
      // Two tiles of dS: who stores to one has passed the barrier after which nobody multiplies the other one's keys.
      const uint32_t ds_tile = shared.ds_tile(stage);
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        ptx::stmatrix_x4_transposed(ds_tile + ds_lane + k * kDepth * kRowBytes, ds_operand[k]);
      }
      ptx::pin(p_operand);
      ptx::pin(dv);
      multiply_registers<Element, QueryTile>(dv, p_operand, panel_descriptor<QueryTile>(shared.dout_tile(stage)));
      ptx::wgmma_commit();

      ptx::fence_async_proxy();
      ptx::named_barrier_wait(kGradientsStored, kConsumerThreads);
      float dq[Config::kQueryFragments][4];
      multiply_keys<Element, Config>(
          dq, row_descriptor(ds_tile + (Config::kDividesRows ? consumer * kConsumerBytes : 0)), key_panels);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      ptx::pin(dv);
      ptx::pin(p_operand);
      if (signals) shared.douts.release(cursor);

      ptx::pin(ds_operand);
      ptx::pin(dk);
      multiply_registers<Element, QueryTile>(dk, ds_operand, panel_descriptor<QueryTile>(shared.query_tile(stage)));
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      ptx::pin(dq);
      if (remaining == 1 && signals) shared.keys.release(key_cursor);
      ptx::named_barrier_wait(kSliceEmpty + consumer, kSliceThreads);
#pragma unroll
      for (int j = 0; j < Config::kQueryFragments; ++j) {
        const uint32_t words[4] = {__float_as_uint(dq[j][0]), __float_as_uint(dq[j][1]), __float_as_uint(dq[j][2]),
                                   __float_as_uint(dq[j][3])};
        ptx::store_shared_16(shared.dq_slice(consumer) + (j * ptx::kWarpgroupThreads + thread) * 16, words);
      }
      ptx::fence_async_proxy();
      ptx::named_barrier_arrive(kSliceFull + consumer, kSliceThreads);
      ptx::wgmma_wait<0>();
      ptx::pin(dk);
      ptx::pin(ds_operand);
      if (signals) shared.queries.release(cursor);
      cursor.advance();
      work.advance(visit);
    }
    if (work.visits() > 0) key_cursor.advance();
    store_key_gradients<Element>(attention, work, dk, dv, tile_key, lane);
  }
}

}  // namespace flash_attn::sm90
