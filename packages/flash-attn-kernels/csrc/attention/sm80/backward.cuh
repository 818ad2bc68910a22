// Backward attention: one block per (key-value head, tile of keys), walking over the query tiles that see it.
//
//   P = exp(S - LSE), dV += P^T dO, dP = dO V^T, dS = P (dP - delta), dQ += dS K, dK += dS^T Q
//
// dK and dV stay in registers, over all query heads of the group too; dQ is added to an fp32 accumulator.
#pragma once

#include <type_traits>

#include "../../ptx/shared_memory.cuh"
#include "../../ptx/special_registers.cuh"
#include "../dropout.cuh"
#include "../mask.cuh"
#include "../modifier_gradients.cuh"
#include "../params.h"
#include "../score_modifiers.cuh"
#include "../sequence.cuh"
#include "../shared_tile.cuh"
#include "../tile_copy.cuh"
#include "../visible_range.cuh"
#include "../warp_gemm.cuh"
#include "backward_work.cuh"
#include "config.h"
#include "dq_accumulator.cuh"
#include "key_gradients.cuh"

namespace flash_attn::sm80 {

template <typename Config>
struct BackwardShared {
  static constexpr int kVectorBytes = Config::kRows * 4;
  static constexpr int kStageBytes = Config::QueryTile::kBytes + Config::OutTile::kBytes;

  uint32_t base;

  __device__ __forceinline__ typename Config::KeyTile k() const { return {base}; }
  __device__ __forceinline__ typename Config::ValueTile v() const { return {base + Config::KeyTile::kBytes}; }
  __device__ __forceinline__ typename Config::ScoreTile p() const { return {v().base + Config::ValueTile::kBytes}; }
  __device__ __forceinline__ typename Config::ScoreTile ds() const { return {p().base + Config::ScoreTile::kBytes}; }
  __device__ __forceinline__ typename Config::QueryTile q(int stage) const {
    return {p().base + 2 * Config::ScoreTile::kBytes + stage * kStageBytes};
  }
  __device__ __forceinline__ typename Config::OutTile dout(int stage) const {
    return {q(stage).base + Config::QueryTile::kBytes};
  }
  __device__ __forceinline__ uint32_t lse(int stage) const {
    return q(Config::kStages).base + stage * 2 * kVectorBytes;
  }
  __device__ __forceinline__ uint32_t delta(int stage) const { return lse(stage) + kVectorBytes; }
};

// Scores and dP of a warp become P, as dV needs it, and dS, as dQ and dK do. Plain: windows only.
template <typename Config, int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void differentiate_scores(float (&scores)[kRowTiles][kColumnTiles][4],
                                                     float (&ds)[kRowTiles][kColumnTiles][4], float scale_log2,
                                                     const BackwardShared<Config>& shared, int stage, int tile_row) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile_row + 16 * i + 8 * half;
      const float lse = ptx::load_shared_float(shared.lse(stage) + row * 4);
      const float delta = ptx::load_shared_float(shared.delta(stage) + row * 4);
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          scores[i][j][e] = ptx::exp2(fmaf(scores[i][j][e], scale_log2, -lse));
          ds[i][j][e] = scores[i][j][e] * (ds[i][j][e] - delta);
        }
      }
    }
  }
}

// The same with everything that modifies scores, and the gradients of what does. The bias is in the tile of dS.
template <typename Config, int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void differentiate_modified_scores(
    float (&scores)[kRowTiles][kColumnTiles][4], float (&ds)[kRowTiles][kColumnTiles][4], SlopeGradient& slope_gradient,
    const BackwardParams& params, const Sequence& sequence, int head, bool masked, const BackwardShared<Config>& shared,
    int stage, const FragmentOrigin& origin) {
  const ModifierParams& modifiers = params.modifiers;
  const ScoreModifier modifier(params, sequence, head);
  float slopes[kRowTiles][kColumnTiles][4];
  modifier.apply(scores, slopes, origin, shared.ds());
  if (masked) mask_scores<true>(scores, sequence, params.window, origin.row, origin.column);
  float lse[kRowTiles][2], delta[kRowTiles][2];
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = origin.tile_row + 16 * i + 8 * half;
      lse[i][half] = ptx::load_shared_float(shared.lse(stage) + row * 4);
      delta[i][half] = ptx::load_shared_float(shared.delta(stage) + row * 4);
    }
  }
  for_each_element<kRowTiles, kColumnTiles>(
      [&](int i, int j, int e) { scores[i][j][e] = ptx::exp2(scores[i][j][e] - lse[i][e / 2]); });
  if (modifiers.seed_and_offset != nullptr) {
    const Dropout dropout(modifiers, sequence.index * params.shape.heads + head);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
        bool kept[4];
        dropout.keep(kept, origin.row + 16 * i, origin.column + 8 * j);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float keep_scale = kept[e] ? modifiers.keep_scale : 0.f;
          ds[i][j][e] = scores[i][j][e] * (ds[i][j][e] * keep_scale - delta[i][e / 2]);
          scores[i][j][e] *= keep_scale;
        }
      }
    }
  } else {
    for_each_element<kRowTiles, kColumnTiles>(
        [&](int i, int j, int e) { ds[i][j][e] = scores[i][j][e] * (ds[i][j][e] - delta[i][e / 2]); });
  }
  if (params.dbias.present) add_bias_gradient(params, sequence.index, head, ds, origin);
  if (params.slope_partial != nullptr) {
    for_each_element<kRowTiles, kColumnTiles>(
        [&](int i, int j, int e) { slope_gradient.sum -= ds[i][j][e] * modifier.distance(origin, i, j, e); });
  }
  if (modifiers.softcap > 0.f) {
    for_each_element<kRowTiles, kColumnTiles>([&](int i, int j, int e) { ds[i][j][e] *= slopes[i][j][e]; });
  }
}

template <typename Element, typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerMultiprocessor)
    backward_kernel(const __grid_constant__ BackwardParams params) {
  using Rows = std::conditional_t<Config::kGeneral, GeneralRows, AlignedRows>;
  constexpr int kRows = Config::kRows, kColumns = Config::kColumns, kHeadDim = Config::kHeadDim;
  constexpr int kThreads = Config::kThreads, kStages = Config::kStages;
  const ProblemShape& shape = params.shape;

  const BackwardWork work(params, kColumns);
  const Sequence sequence(params, work.index);
  const int first_query_slot = first_slot(params.queries, work.index, kRows);
  const int first_key = work.key_tile * kColumns;
  const QueryTiles visible = visible_query_tiles(sequence, params.window, first_key, kColumns, kRows);
  const int end_head = work.end_head(params);
  Visit visit{work.first_head(params), visible.begin};
  if (visible.begin == visible.end) visit.head = end_head;

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int score_row = warp % Config::kScoreWarps * 16 * Config::kScoreRowTiles;
  const int score_column = warp / Config::kScoreWarps * 8 * Config::kScoreColumnTiles;
  const int key_row = warp % Config::kKeyWarps * 16 * Config::kKeyRowTiles;
  const int key_column = warp / Config::kKeyWarps * 8 * Config::kKeyColumnTiles;
  const int value_column = warp / Config::kKeyWarps * 8 * Config::kValueColumnTiles;
  const int query_row = warp % Config::kQueryWarps * 16 * Config::kQueryRowTiles;
  const int query_column = warp / Config::kQueryWarps * 8 * Config::kQueryColumnTiles;

  extern __shared__ __align__(1024) uint8_t shared_memory[];
  const BackwardShared<Config> shared{ptx::shared_address(shared_memory)};

  const auto load_queries = [&](const Visit& visit, int stage) {
    const int first_query = visit.tile * kRows;
    const int thread = ptx::thread_index();
    const Rows q(params, params.q, sequence.index, sequence.first_q, sequence.seqlen_q, visit.head, shape.head_dim);
    const Rows dout(params, params.dout, sequence.index, sequence.first_q, sequence.seqlen_q, visit.head,
                    shape.head_dim_v);
    load_tile_async<kThreads>(shared.q(stage), q, first_query, thread);
    load_tile_async<kThreads>(shared.dout(stage), dout, first_query, thread);
    constexpr int kVectorChunks = kRows / 4;
    static_assert(2 * kVectorChunks <= kThreads);
    if (thread < 2 * kVectorChunks) {
      const float* source = thread < kVectorChunks ? params.lse_log2 : params.delta;
      const int chunk = thread % kVectorChunks;
      const uint32_t target = thread < kVectorChunks ? shared.lse(stage) : shared.delta(stage);
      ptx::cp_async_16(target + chunk * 16, source + scratch_tile(params, first_query_slot, visit) * kRows + chunk * 4,
                       true);
    }
  };

  float dk[Config::kKeyRowTiles][Config::kKeyColumnTiles][4];
  float dv[Config::kKeyRowTiles][Config::kValueColumnTiles][4];
  clear(dk);
  clear(dv);
  SlopeGradient slope_gradient;

  if (visit.head < end_head) {
    const Rows k = key_rows(
        Rows(params, params.k, sequence.index, sequence.first_k, sequence.seqlen_k, work.kv_head, shape.head_dim),
        params, sequence.index, 0);
    const Rows v = key_rows(
        Rows(params, params.v, sequence.index, sequence.first_k, sequence.seqlen_k, work.kv_head, shape.head_dim_v),
        params, sequence.index, 0);
    load_tile_async<kThreads>(shared.k(), k, first_key, thread);
    load_tile_async<kThreads>(shared.v(), v, first_key, thread);
    load_queries(visit, 0);
    ptx::cp_async_commit();
  }

  for (int stage = 0; visit.head < end_head; visit.advance(visible), stage = (stage + 1) % kStages) {
    const int first_query = visit.tile * kRows;
    const LaneOffsets lanes(lane);
    ptx::cp_async_wait<0>();
    __syncthreads();  // this visit's operands are there for everybody, and nobody reads the previous visit's
    const auto load_next = [&] {
      Visit next = visit;
      next.advance(visible);
      if (next.head < end_head) load_queries(next, (stage + 1) % kStages);
      ptx::cp_async_commit();
    };
    if constexpr (Config::kGeneral) {
      ScoreModifier(params, sequence, visit.head)
          .template load_bias_async<kThreads>(shared.ds(), first_query, first_key, ptx::thread_index());
      ptx::cp_async_commit();
    }
    if (kStages > 1) load_next();

    float scores[Config::kScoreRowTiles][Config::kScoreColumnTiles][4];
    clear(scores);
    warp_gemm<Element, kHeadDim / 16, kHeadDim / 16>(scores, RowOperand{shared.q(stage), score_row, lanes.rows_first},
                                                     RowOperand{shared.k(), score_column, lanes.columns_first});
    float ds[Config::kScoreRowTiles][Config::kScoreColumnTiles][4];
    clear(ds);
    warp_gemm<Element, Config::kHeadDimV / 16, Config::kHeadDimV / 16>(
        ds, RowOperand{shared.dout(stage), score_row, lanes.rows_first},
        RowOperand{shared.v(), score_column, lanes.columns_first});
    const FragmentOrigin origin(score_row, score_column, lane, first_query, first_key);
    const bool masked = !is_clean(sequence, params.window, first_query, kRows, first_key, kColumns);
    if constexpr (Config::kGeneral) {
      ptx::cp_async_wait<kStages - 1>();
      __syncthreads();  // the bias is there for everybody
      differentiate_modified_scores(scores, ds, slope_gradient, params, sequence, visit.head, masked, shared, stage,
                                    origin);
    } else {
      if (masked) mask_scores<true>(scores, sequence, params.window, origin.row, origin.column);
      differentiate_scores(scores, ds, params.softmax_scale_log2, shared, stage, origin.tile_row);
    }
    store_fragments<Element>(shared.p(), scores, score_row, score_column, lane);
    store_fragments<Element>(shared.ds(), ds, score_row, score_column, lane);
    if (params.dq_turn != nullptr && thread == 0) {
      const int mine = work.turn(visible_key_tiles(sequence, params.window, first_query, kRows, kColumns));
      const int* turn = params.dq_turn + scratch_tile(params, first_query_slot, visit);
      ptx::wait_until_equal(turn, mine);
    }
    __syncthreads();  // P and dS are complete, and dQ is this block's to add to

    warp_gemm<Element, kRows / 16, kRows / 16>(
        dv, TransposedOperand{shared.p(), key_row / 16, lanes.columns_first},
        TransposedOperand{shared.dout(stage), value_column / 16, lanes.rows_first});
    {
      float dq[Config::kQueryRowTiles][Config::kQueryColumnTiles][4];
      clear(dq);
      warp_gemm<Element, kColumns / 16, kColumns / 16>(
          dq, RowOperand{shared.ds(), query_row, lanes.rows_first},
          TransposedOperand{shared.k(), query_column / 16, lanes.rows_first});
      add_to_accumulator<kThreads>(
          params.dq_accumulator + scratch_tile(params, first_query_slot, visit) * (kRows * kHeadDim), dq, thread);
    }
    warp_gemm<Element, kRows / 16, kRows / 16>(dk, TransposedOperand{shared.ds(), key_row / 16, lanes.columns_first},
                                               TransposedOperand{shared.q(stage), key_column / 16, lanes.rows_first});

    if constexpr (Config::kGeneral) {
      if (params.slope_partial != nullptr && visit.tile + 1 == visible.end) {
        slope_gradient.flush(params, visit.head, first_slot(params.keys, work.index, kColumns) + work.key_tile, warp,
                             Config::kWarps);
      }
    }
    // The turn is handed on this late because the additions to dQ have arrived by now: the release need not wait. It
    // covers those of the whole block, whose threads have met at the barrier.
    if (kStages == 1 || params.dq_turn != nullptr) __syncthreads();  // nobody reads this visit's operands any more
    if (params.dq_turn != nullptr && thread == 0) {
      ptx::add_release(params.dq_turn + scratch_tile(params, first_query_slot, visit), 1);
    }
    if (kStages == 1) load_next();
  }
  __syncthreads();  // nobody reads K and V any more

  store_key_gradients<Element, Config>(params, shared.k(), shared.v(), dk, dv);
}

}  // namespace flash_attn::sm80
