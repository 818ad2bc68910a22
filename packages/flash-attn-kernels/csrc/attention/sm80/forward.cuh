// Forward attention: one block per (batch, head, tile of queries), walking over the visible tiles of keys.
#pragma once

#include "../../ptx/special_registers.cuh"
#include "../mask.cuh"
#include "../params.h"
#include "../shared_tile.cuh"
#include "../softmax.cuh"
#include "../visible_range.cuh"
#include "config.h"
#include "warp_gemm.cuh"

namespace flash_attn::sm80 {

// Which output a block computes. Tiles of one head are neighbours, so that its K and V stay in L2, and the last tiles
// of a head, the longest ones under a causal mask, come first.
struct ForwardWork {
  int batch, head, first_query;

  __device__ __forceinline__ ForwardWork(const ProblemShape& shape, int rows) {
    const int tiles = ceil_div(shape.seqlen_q, rows);
    const int block = ptx::block_index();
    first_query = (tiles - 1 - block % tiles) * rows;
    head = block / tiles % shape.heads;
    batch = block / tiles / shape.heads;
  }
};

// Writes the warp's rows of the output, through its own rows of the query tile, and their log-sum-exp. Indices are
// derived anew, so that they occupy no registers during the main loop.
template <typename Element, typename Config, typename QueryTile, int kOutTiles>
__device__ __forceinline__ void store_output(const ForwardParams& params, const QueryTile& q_tile,
                                             const float (&out)[Config::kRowTiles][kOutTiles][4],
                                             const OnlineSoftmax<Config::kRowTiles>& softmax) {
  const ProblemShape& shape = params.shape;
  const ForwardWork work(shape, Config::kRows);
  const int thread = ptx::thread_index(), lane = thread % 32;
  const int warp_row = (thread / 32) * 16 * Config::kRowTiles;
  if (lane % 4 == 0) {
    float* lse = params.lse + (static_cast<int64_t>(work.batch) * shape.heads + work.head) * shape.seqlen_q;
#pragma unroll
    for (int r = 0; r < 2 * Config::kRowTiles; ++r) {
      const int row = work.first_query + warp_row + 16 * (r / 2) + 8 * (r % 2) + lane / 4;
      if (row < shape.seqlen_q) lse[row] = softmax.sum[r];
    }
  }
  // A warp's query rows are read by that warp alone, so it may overwrite them without a block barrier.
  __syncwarp();
  store_fragments<Element>(q_tile, out, warp_row, 0, lane);
  __syncwarp();
  store_tile<32, 16 * Config::kRowTiles>(q_tile, matrix_of(params.out, work.batch, work.head), params.out.row_stride,
                                         warp_row, work.first_query, shape.seqlen_q, lane);
}

template <typename Element, typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerMultiprocessor)
    forward_kernel(const __grid_constant__ ForwardParams params) {
  using QueryTile = SharedTile<Config::kRows, Config::kHeadDim>;
  using KeyTile = SharedTile<Config::kColumns, Config::kHeadDim>;
  constexpr int kDepthTiles = Config::kHeadDim / 16;
  constexpr int kScoreTiles = Config::kColumns / 8;
  constexpr int kOutTiles = Config::kHeadDim / 8;
  const ProblemShape& shape = params.shape;

  const ForwardWork work(shape, Config::kRows);
  const int kv_head = work.head / shape.heads_per_kv_head;
  const int warp_row = (threadIdx.x / 32) * 16 * Config::kRowTiles;

  extern __shared__ __align__(1024) uint8_t shared[];
  const QueryTile q_tile{ptx::shared_address(shared)};
  const KeyTile k_tile{q_tile.base + QueryTile::kBytes};
  const KeyTile v_tile{k_tile.base + KeyTile::kBytes};

  const uint16_t* q = matrix_of(params.q, work.batch, work.head);
  const uint16_t* k = matrix_of(params.k, work.batch, kv_head);
  const uint16_t* v = matrix_of(params.v, work.batch, kv_head);
  const auto load_keys = [&](int n) {
    load_tile_async<Config::kThreads>(k_tile, k, params.k.row_stride, n * Config::kColumns, shape.seqlen_k,
                                      ptx::thread_index());
  };
  const auto load_values = [&](int n) {
    load_tile_async<Config::kThreads>(v_tile, v, params.v.row_stride, n * Config::kColumns, shape.seqlen_k,
                                      ptx::thread_index());
  };

  const TileRange range = visible_key_tiles(shape, params.window, work.first_query, Config::kRows, Config::kColumns);
  float out[Config::kRowTiles][kOutTiles][4];
  clear(out);
  OnlineSoftmax<Config::kRowTiles> softmax;

  if (range.begin < range.end) {
    load_tile_async<Config::kThreads>(q_tile, q, params.q.row_stride, work.first_query, shape.seqlen_q,
                                      ptx::thread_index());
    load_keys(range.end - 1);
    ptx::cp_async_commit();
  }

  // V[n] arrives under the scores of tile n, K[n - 1] under its softmax and output product.
  const auto step = [&]<bool kMasked>(int n) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // K[n] is there for everybody, and nobody reads V[n + 1] any more
    load_values(n);
    ptx::cp_async_commit();

    const int lane = ptx::thread_index() % 32;
    const LaneOffsets lanes(lane);
    float scores[Config::kRowTiles][kScoreTiles][4];
    clear(scores);
    warp_gemm<Element, kDepthTiles, Config::kScoreUnroll>(scores, RowOperand{q_tile, warp_row, lanes.rows_first},
                                                          RowOperand{k_tile, 0, lanes.columns_first});

    ptx::cp_async_wait<0>();
    __syncthreads();  // V[n] is there for everybody, and nobody reads K[n] any more
    if (n > range.begin) load_keys(n - 1);
    ptx::cp_async_commit();

    if constexpr (kMasked) {
      mask_scores(scores, shape, params.window, work.first_query + warp_row + lane / 4,
                  n * Config::kColumns + 2 * (lane % 4));
    }
    softmax.template update<kMasked>(scores, out, params.softmax_scale_log2);
    constexpr int kKeyTiles = Config::kColumns / 16;
    warp_gemm<Element, kKeyTiles, kKeyTiles>(out, RegisterOperand<Element, Config::kRowTiles, kScoreTiles>{scores},
                                             TransposedOperand{v_tile, 0, lanes.rows_first});
  };
  int n = range.end - 1;
  for (; n >= range.clean_end; --n) step.template operator()<true>(n);
  for (; n >= range.clean_begin; --n) step.template operator()<false>(n);
  for (; n >= range.begin; --n) step.template operator()<true>(n);
  ptx::cp_async_wait<0>();

  softmax.finalize(out, params.softmax_scale);
  store_output<Element, Config>(params, q_tile, out, softmax);
}

}  // namespace flash_attn::sm80
