// Forward attention: one block per (head, tile of queries), walking over the visible tiles of keys.
#pragma once

#include <type_traits>

#include "../../ptx/special_registers.cuh"
#include "../dropout.cuh"
#include "../mask.cuh"
#include "../params.h"
#include "../score_modifiers.cuh"
#include "../sequence.cuh"
#include "../shared_tile.cuh"
#include "../softmax.cuh"
#include "../tile_copy.cuh"
#include "../visible_range.cuh"
#include "../warp_gemm.cuh"
#include "config.h"

namespace flash_attn::sm80 {

// Which output a block computes. Tiles of one sequence and head are neighbours, so that its K and V stay in L2, and
// the last tiles of a sequence, the longest ones under a causal mask, come first.
struct ForwardWork {
  int head, index, first_query;

  __device__ __forceinline__ ForwardWork(const ForwardParams& params, int rows) {
    const int block = ptx::block_index();
    const Slot slot(params.queries, params.shape.batch, rows, block % params.query_slots);
    head = block / params.query_slots;
    index = slot.index;
    first_query = (slot.tiles - 1 - slot.tile) * rows;
  }
};

// Normalises the warp's rows of the output and writes them, through its own rows of the query tile, with their
// log-sum-exp. Indices are derived anew, so that they occupy no registers during the main loop.
template <typename Element, typename Config, int kOutTiles>
__device__ __forceinline__ void store_output(const ForwardParams& params, uint32_t shared_base,
                                             float (&out)[Config::kRowTiles][kOutTiles][4],
                                             OnlineSoftmax<Config::kRowTiles>& softmax) {
  const ForwardWork work(params, Config::kRows);
  const Sequence sequence(params, work.index);
  const int stored = stored_rows(params.queries, params.shape.batch, work.index);
  const int thread = ptx::thread_index(), lane = thread % 32;
  const int warp_row = (thread / 32) * 16 * Config::kRowTiles;
  const float sink = params.learnable_sink == nullptr ? -INFINITY : params.learnable_sink[work.head];
  // General scores carry the scale already, and are in base 2.
  softmax.finalize(out, Config::kGeneral ? 1.f / kLog2e : params.softmax_scale,
                   Config::kGeneral ? params.modifiers.keep_scale : 1.f, sink, work.first_query + warp_row + lane / 4,
                   sequence.seqlen_q);
  if (lane % 4 == 0) {
    float* lse = params.lse + lse_offset(params, sequence, work.head);
#pragma unroll
    for (int r = 0; r < 2 * Config::kRowTiles; ++r) {
      const int row = work.first_query + warp_row + 16 * (r / 2) + 8 * (r % 2) + lane / 4;
      if (row < stored) lse[row] = softmax.sum[r];
    }
  }
  // A warp's query rows are read by that warp alone, so it may overwrite them without a block barrier.
  const typename Config::OutTile tile{shared_base};
  if constexpr (!std::is_same_v<typename Config::OutTile, typename Config::QueryTile>) __syncthreads();
  __syncwarp();
  store_fragments<Element>(tile, out, warp_row, 0, lane);
  __syncwarp();
  store_tile<32, 16 * Config::kRowTiles, !Config::kGeneral>(
      tile, matrix_of(params.out, sequence.index, sequence.first_q, work.head), params.out.row_stride, warp_row,
      work.first_query, stored, params.shape.head_dim_v, lane);
}

// Hides the keys of a tile that do not exist.
template <int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void hide_absent(float (&scores)[kRowTiles][kColumnTiles][4], const uint8_t* exist,
                                            const FragmentOrigin& origin) {
#pragma unroll
  for (int j = 0; j < kColumnTiles; ++j) {
    const uchar2 pair = *reinterpret_cast<const uchar2*>(exist + origin.tile_column + 8 * j);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if ((e % 2 == 0 ? pair.x : pair.y) == 0) scores[i][j][e] = -INFINITY;
      }
    }
  }
}

template <typename Element, typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerMultiprocessor)
    forward_kernel(const __grid_constant__ ForwardParams params) {
  using Rows = std::conditional_t<Config::kGeneral, GeneralRows, AlignedRows>;
  constexpr int kDepthTiles = Config::kHeadDim / 16;
  constexpr int kScoreTiles = Config::kColumns / 8;
  constexpr int kOutTiles = Config::kHeadDimV / 8;
  const ProblemShape& shape = params.shape;

  const ForwardWork work(params, Config::kRows);
  const Sequence sequence(params, work.index);
  const int kv_head = work.head / shape.heads_per_kv_head;
  const int warp_row = (threadIdx.x / 32) * 16 * Config::kRowTiles;

  extern __shared__ __align__(1024) uint8_t shared[];
  const typename Config::QueryTile q_tile{ptx::shared_address(shared)};
  const typename Config::KeyTile k_tile{q_tile.base + Config::QueryTile::kBytes};
  const typename Config::ValueTile v_tile{k_tile.base + Config::KeyTile::kBytes};
  const typename Config::BiasTile bias_tile{v_tile.base + Config::ValueTile::kBytes};

  const Rows keys =
      key_rows(Rows(params, params.k, sequence.index, sequence.first_k, sequence.seqlen_k, kv_head, shape.head_dim),
               params, sequence.index, params.modifiers.pages.k_page_stride);
  const Rows values =
      key_rows(Rows(params, params.v, sequence.index, sequence.first_k, sequence.seqlen_k, kv_head, shape.head_dim_v),
               params, sequence.index, params.modifiers.pages.v_page_stride);
  // Whether the keys of a tile are in pages that exist: of the tile in use, and of the one on its way.
  uint8_t* const keys_exist = shared + Config::kSharedBytes - 2 * Config::kColumns;
  const auto load_keys = [&](int n) {
    load_tile_async<Config::kThreads>(
        k_tile, keys, n * Config::kColumns, ptx::thread_index(),
        [&](int row, bool exists) { keys_exist[n % 2 * Config::kColumns + row] = exists; });
  };
  const auto load_values = [&](int n) {
    load_tile_async<Config::kThreads>(v_tile, values, n * Config::kColumns, ptx::thread_index());
  };

  const TileRange range = visible_key_tiles(sequence, params.window, work.first_query, Config::kRows, Config::kColumns);
  float out[Config::kRowTiles][kOutTiles][4];
  clear(out);
  OnlineSoftmax<Config::kRowTiles> softmax;

  if (range.begin < range.end) {
    const Rows queries(params, params.q, sequence.index, sequence.first_q, sequence.seqlen_q, work.head,
                       shape.head_dim);
    load_tile_async<Config::kThreads>(q_tile, queries, work.first_query, ptx::thread_index());
    load_keys(range.end - 1);
    ptx::cp_async_commit();
  }

  // V[n] arrives under the scores of tile n, K[n - 1] under its softmax and output product.
  const auto step = [&]<bool kMasked>(int n) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // K[n] is there for everybody, and nobody reads V[n + 1] any more
    load_values(n);
    if constexpr (Config::kGeneral) {
      ScoreModifier(params, sequence, work.head)
          .template load_bias_async<Config::kThreads>(bias_tile, work.first_query, n * Config::kColumns,
                                                      ptx::thread_index());
    }
    ptx::cp_async_commit();

    const int lane = ptx::thread_index() % 32;
    const LaneOffsets lanes(lane);
    const FragmentOrigin origin(warp_row, 0, lane, work.first_query, n * Config::kColumns);
    float scores[Config::kRowTiles][kScoreTiles][4];
    clear(scores);
    warp_gemm<Element, kDepthTiles, Config::kScoreUnroll>(scores, RowOperand{q_tile, warp_row, lanes.rows_first},
                                                          RowOperand{k_tile, 0, lanes.columns_first});

    ptx::cp_async_wait<0>();
    __syncthreads();  // V[n] is there for everybody, and nobody reads K[n] any more
    if (n > range.begin) load_keys(n - 1);
    ptx::cp_async_commit();

    bool masked = kMasked;
    if constexpr (Config::kGeneral) {
      float slopes[Config::kRowTiles][kScoreTiles][4];  // only the backward needs them
      ScoreModifier(params, sequence, work.head).apply(scores, slopes, origin, bias_tile);
      if (params.modifiers.pages.table != nullptr) hide_absent(scores, keys_exist + n % 2 * Config::kColumns, origin);
      masked =
          !is_clean(sequence, params.window, work.first_query, Config::kRows, n * Config::kColumns, Config::kColumns);
    }
    if (masked) mask_scores<true>(scores, sequence, params.window, origin.row, origin.column);
    softmax.template update<kMasked>(scores, out, Config::kGeneral ? 1.f : params.softmax_scale_log2);
    if constexpr (Config::kGeneral) {
      if (params.modifiers.seed_and_offset != nullptr) {
        const Dropout dropout(params.modifiers, sequence.index * shape.heads + work.head);
#pragma unroll
        for (int i = 0; i < Config::kRowTiles; ++i) {
#pragma unroll
          for (int j = 0; j < kScoreTiles; ++j) {
            bool kept[4];
            dropout.keep(kept, origin.row + 16 * i, origin.column + 8 * j);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              if (!kept[e]) scores[i][j][e] = 0.f;
            }
          }
        }
      }
    }
    constexpr int kKeyTiles = Config::kColumns / 16;
    warp_gemm<Element, kKeyTiles, kKeyTiles>(out, RegisterOperand<Element, Config::kRowTiles, kScoreTiles>{scores},
                                             TransposedOperand{v_tile, 0, lanes.rows_first});
  };
  int n = range.end - 1;
  if constexpr (Config::kGeneral) {
    for (; n >= range.begin; --n) step.template operator()<true>(n);
  } else {
    for (; n >= range.clean_end; --n) step.template operator()<true>(n);
    for (; n >= range.clean_begin; --n) step.template operator()<false>(n);
    for (; n >= range.begin; --n) step.template operator()<true>(n);
  }
  ptx::cp_async_wait<0>();
  store_output<Element, Config>(params, q_tile.base, out, softmax);
}

}  // namespace flash_attn::sm80
