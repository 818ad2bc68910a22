// A warpgroup of a block that computes 64 rows of every tile.
#pragma once

#include <cmath>

#include "../../ptx/warpgroup.cuh"
#include "../mask.cuh"
#include "../score_modifiers.cuh"
#include "../softmax.cuh"
#include "forward_params.h"
#include "forward_shared.cuh"
#include "store_rows.cuh"
#include "warpgroup_gemm.cuh"

namespace flash_attn::sm90 {

enum NamedBarrier : int { kTurn = 1, kWarpgroup = 4 };  // one of each for every consumer

// Rows of a value tile past the end of a sequence may hold anything, which times the probability 0 need not be 0.
// Every consumer clears all of them, so that none has to wait for another.
template <typename Tile>
__device__ __forceinline__ void clear_rows(const Tile& tile, int first, int consumer) {
  const int thread = threadIdx.x % ptx::kWarpgroupThreads;
  for (int row = first + thread / kPanelChunks; row < Tile::kRows; row += ptx::kWarpgroupThreads / kPanelChunks) {
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      ptx::store_shared_16(tile.chunk_address(row, panel * kPanelChunks + thread % kPanelChunks), {0u, 0u, 0u, 0u});
    }
  }
  ptx::fence_async_proxy();
  ptx::named_barrier_wait(kWarpgroup + consumer, ptx::kWarpgroupThreads);
}

// Normalises the warp's 16 rows of the output and writes them, with their log-sum-exp. `row` is the thread's first
// query.
template <typename Element, bool kSoftcap, int kOutTiles>
__device__ __forceinline__ void store_output(const ForwardParams& params, const ForwardWork& work, int row,
                                             float (&out)[1][kOutTiles][4], OnlineSoftmax<1>& softmax) {
  const Sequence& sequence = work.sequence;
  const int lane = threadIdx.x % 32;
  const float sink = params.learnable_sink == nullptr ? -INFINITY : params.learnable_sink[work.head];
  softmax.finalize(out, kSoftcap ? 1.f / kLog2e : params.softmax_scale, 1.f, sink, row, sequence.seqlen_q);
  if (lane % 4 == 0) {
    float* lse = params.lse + lse_offset(params, sequence, work.head);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (row + 8 * r < work.stored) lse[row + 8 * r] = softmax.sum[r];
    }
  }
  store_rows<Element>(out[0], matrix_of(params.out, sequence.index, sequence.first_q, work.head), params.out.row_stride,
                      row, {sequence.seqlen_q, work.stored}, params.shape.head_dim_v, lane);
}

// One warpgroup: computes its rows of every tile.
template <typename Element, typename Config, bool kSoftcap>
__device__ __forceinline__ void consume(const ForwardKernelParams& params, const ForwardShared<Config>& shared,
                                        int consumer) {
  using QueryTile = typename Config::QueryTile;
  using KeyTile = typename Config::KeyTile;
  using ValueTile = typename Config::ValueTile;
  constexpr int kScoreTiles = Config::kColumns / 8, kOutTiles = Config::kHeadDimV / 8;
  const ForwardParams& attention = params.attention;
  const int thread = threadIdx.x % ptx::kWarpgroupThreads, lane = thread % 32;
  const int tile_row = Config::kConsumerRows * consumer + thread / 32 * 16 + lane / 4;
  const bool signals = thread == 0;  // for all, since products end for the whole warpgroup at once
  const bool ragged_keys = has_rows_behind(attention.keys);
  const float scale_log2 = kSoftcap ? 1.f : attention.softmax_scale_log2;
  Cursor<Config::kWorkStages> cursor;
  Cursor<Config::kQueryStages> query;
  Cursor<Config::kStages> key, value;

  // Consumers take turns, one turn for every tile of keys.
  constexpr int kTurnThreads = 2 * ptx::kWarpgroupThreads;  // who passes the turn and who waits for it
  const auto wait_turn = [&] {
    if constexpr (Config::kTakesTurns) ptx::named_barrier_wait(kTurn + consumer, kTurnThreads);
  };
  const auto pass_turn = [&] {
    if constexpr (Config::kTakesTurns) {
      ptx::named_barrier_arrive(kTurn + (consumer + 1) % Config::kConsumers, kTurnThreads);
    }
  };
  if (consumer == Config::kConsumers - 1) pass_turn();  // the first consumer begins

  while (true) {
    shared.works.wait_full(cursor);
    const ForwardWork& work = shared.storage->works[cursor.stage];
    if (work.head == ForwardWork::kNone) return;
    const TileRange range = shared.storage->ranges[cursor.stage][consumer];
    const int row = work.first_query + tile_row;
    OnlineSoftmax<1> softmax;
    float out[1][kOutTiles][4], correction[2];
    uint32_t probabilities[Config::kColumns / 16][4];
    clear(out[0]);

    const auto release_keys = [&] {
      if (signals) shared.keys.release(key);
      key.advance();
    };
    const auto release_values = [&] {
      if (signals) shared.values.release(value);
      value.advance();
    };
    const auto release_queries = [&] {
      if (signals) shared.queries.release(query);
    };
    // One thread signals for all four warps. Products make them meet; without, a slow warp could find the phase that it
    // waits for over and the next one too, and wait for ever.
    const auto meet = [&] { ptx::named_barrier_wait(kWarpgroup + consumer, ptx::kWarpgroupThreads); };
    const auto skip = [&](int tiles) {
#pragma unroll 1
      for (; tiles > 0; --tiles) {
        wait_turn();
        pass_turn();
        shared.keys.wait_full(key);
        shared.values.wait_full(value);
        meet();
        release_keys();
        release_values();
      }
    };
    const auto start_scores = [&](float (&scores)[1][kScoreTiles][4]) {
      multiply_rows<Element, QueryTile, KeyTile>(
          scores[0], row_descriptor(shared.query_tile(query.stage) + Config::kConsumerRows * kRowBytes * consumer),
          row_descriptor(shared.key_tile(key.stage)));
      ptx::wgmma_commit();
    };
    const auto start_output = [&] {
      multiply_registers<Element, ValueTile>(out[0], probabilities,
                                             panel_descriptor<ValueTile>(shared.value_tile(value.stage)));
      ptx::wgmma_commit();
    };
    const auto to_probabilities = [&](float (&scores)[1][kScoreTiles][4], int n) {
      if constexpr (kSoftcap) {
        soft_cap(scores, SoftCap(attention.softmax_scale_log2, attention.modifiers.softcap),
                 [](int, int, int, float) {});
      }
      if (n >= range.clean_end || n < range.clean_begin) {
        const int column = n * Config::kColumns + 2 * (lane % 4);
        if (attention.window.left == Window::kUnbounded) {
          mask_scores<false>(scores, work.sequence, attention.window, row, column);
        } else {
          mask_scores<true>(scores, work.sequence, attention.window, row, column);
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) correction[r] = softmax.template advance_row<true>(r, scores, scale_log2);
    };

    shared.queries.wait_full(query);
    if (range.begin >= range.end) {  // other consumers' rows see something
      meet();
      release_queries();
      skip(work.range.end - work.range.begin);
    } else {
      skip(work.range.end - range.end);
      int n = range.end - 1;
      {
        float scores[1][kScoreTiles][4];
        shared.keys.wait_full(key);
        wait_turn();
        start_scores(scores);
        pass_turn();
        ptx::wgmma_wait<0>();
        ptx::pin(scores[0]);
        release_keys();
        if (n == range.begin) release_queries();
        to_probabilities(scores, n);
        pack<Element>(probabilities, scores[0]);
      }
      if (ragged_keys && range.end * Config::kColumns > work.sequence.seqlen_k) {
        shared.values.wait_full(value);
        clear_rows(ValueTile{shared.value_tile(value.stage)}, work.sequence.seqlen_k - n * Config::kColumns, consumer);
      }
      if (n > range.begin) shared.keys.wait_full(key);
#pragma unroll 1
      for (--n; n >= range.begin; --n) {
        float scores[1][kScoreTiles][4];
        wait_turn();
        ptx::pin(out[0]);
        ptx::pin(probabilities);
        start_scores(scores);
        shared.values.wait_full(value);
        start_output();
        pass_turn();
        ptx::wgmma_wait<1>();
        ptx::pin(scores[0]);
        release_keys();
        if (n == range.begin) release_queries();
        to_probabilities(scores, n);
        // Looking for the next keys here also keeps the assembler from moving the softmax behind the wait that it
        // fills.
        if (n > range.begin) shared.keys.wait_full(key);
        ptx::wgmma_wait<0>();
        ptx::pin(out[0]);
        ptx::pin(probabilities);
        release_values();
#pragma unroll
        for (int r = 0; r < 2; ++r) softmax.rescale_row(r, out, correction[r]);
        pack<Element>(probabilities, scores[0]);
      }
      shared.values.wait_full(value);
      ptx::pin(out[0]);
      ptx::pin(probabilities);
      start_output();
      ptx::wgmma_wait<0>();
      ptx::pin(out[0]);
      release_values();
      skip(range.begin - work.range.begin);
    }
    query.advance();
    store_output<Element, kSoftcap>(attention, work, row, out, softmax);
    __syncwarp();
    if (lane == 0) shared.works.release(cursor);
    cursor.advance();
  }
}

}  // namespace flash_attn::sm90
