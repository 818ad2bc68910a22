// Backward attention: one block per (batch, key-value head, tile of keys), walking over the query tiles that see it.
//
//   P = exp(S - LSE), dV += P^T dO, dP = dO V^T, dS = P (dP - delta), dQ += dS K, dK += dS^T Q
//
// dK and dV stay in registers, over all query heads of the group too; dQ is added to an fp32 accumulator.
#pragma once

#include "../../ptx/special_registers.cuh"
#include "../mask.cuh"
#include "../params.h"
#include "../shared_tile.cuh"
#include "../visible_range.cuh"
#include "config.h"
#include "dq_accumulator.cuh"
#include "warp_gemm.cuh"

namespace flash_attn::sm80 {

template <typename Config>
struct BackwardShared {
  using KeyTile = SharedTile<Config::kColumns, Config::kHeadDim>;
  using QueryTile = SharedTile<Config::kRows, Config::kHeadDim>;
  using ScoreTile = SharedTile<Config::kRows, Config::kColumns>;
  static constexpr int kVectorBytes = Config::kRows * 4;

  uint32_t base;

  __device__ __forceinline__ KeyTile k() const { return {base}; }
  __device__ __forceinline__ KeyTile v() const { return {base + KeyTile::kBytes}; }
  __device__ __forceinline__ ScoreTile p() const { return {base + 2 * KeyTile::kBytes}; }
  __device__ __forceinline__ ScoreTile ds() const { return {p().base + ScoreTile::kBytes}; }
  __device__ __forceinline__ QueryTile q(int stage) const {
    return {p().base + 2 * ScoreTile::kBytes + stage * 2 * QueryTile::kBytes};
  }
  __device__ __forceinline__ QueryTile dout(int stage) const { return {q(stage).base + QueryTile::kBytes}; }
  __device__ __forceinline__ uint32_t lse(int stage) const {
    return q(Config::kStages).base + stage * 2 * kVectorBytes;
  }
  __device__ __forceinline__ uint32_t delta(int stage) const { return lse(stage) + kVectorBytes; }
};

__device__ __forceinline__ float load_shared_float(uint32_t address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}

// Which keys a block owns. In deterministic mode the key tiles add to a tile of dQ one after the other, in the order in
// which their blocks start: a block never waits for one that starts later. Under a bounded right side that order is
// descending, so that the first query tile of a block is its own turn at once.
struct BackwardWork {
  bool descending;
  int batch, kv_head, key_tile;

  __device__ __forceinline__ BackwardWork(const BackwardParams& params, int columns) {
    const ProblemShape& shape = params.shape;
    const int tiles = ceil_div(shape.seqlen_k, columns);
    const int kv_heads = shape.heads / shape.heads_per_kv_head;
    const int block = ptx::block_index();
    descending = params.dq_turn != nullptr && params.window.right != Window::kUnbounded;
    key_tile = descending ? tiles - 1 - block % tiles : block % tiles;
    kv_head = block / tiles % kv_heads;
    batch = block / tiles / kv_heads;
  }

  // How many key tiles add to a query tile before this one does.
  __device__ __forceinline__ int turn(const TileRange& key_tiles) const {
    return descending ? key_tiles.end - 1 - key_tile : key_tile - key_tiles.begin;
  }
};

// One query tile of one query head.
struct Visit {
  int head, tile;

  __device__ __forceinline__ void advance(const QueryTiles& visible) {
    if (++tile == visible.end) {
      tile = visible.begin;
      ++head;
    }
  }
};

// dK and dV leave through the tiles of K and V. Indices are derived anew, so that they occupy no registers during the
// main loop.
template <typename Element, typename Config, int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void store_key_gradients(const BackwardParams& params, const BackwardShared<Config>& shared,
                                                    float (&dk)[kRowTiles][kColumnTiles][4],
                                                    const float (&dv)[kRowTiles][kColumnTiles][4]) {
  const BackwardWork work(params, Config::kColumns);
  const int thread = ptx::thread_index(), lane = thread % 32, warp = thread / 32;
  const int row = warp % Config::kKeyWarps * 16 * kRowTiles, column = warp / Config::kKeyWarps * 8 * kColumnTiles;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) dk[i][j][e] *= params.softmax_scale;
  __syncthreads();  // nobody reads K and V any more
  store_fragments<Element>(shared.k(), dk, row, column, lane);
  store_fragments<Element>(shared.v(), dv, row, column, lane);
  __syncthreads();
  const auto store = [&](const auto& tile, const TensorView& target) {
    store_tile<Config::kThreads, Config::kColumns>(tile, matrix_of(target, work.batch, work.kv_head), target.row_stride,
                                                   0, work.key_tile * Config::kColumns, params.shape.seqlen_k, thread);
  };
  store(shared.k(), params.dk);
  store(shared.v(), params.dv);
}

template <typename Element, typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerMultiprocessor)
    backward_kernel(const __grid_constant__ BackwardParams params) {
  using Shared = BackwardShared<Config>;
  constexpr int kRows = Config::kRows, kColumns = Config::kColumns, kHeadDim = Config::kHeadDim;
  constexpr int kThreads = Config::kThreads, kStages = Config::kStages;
  const ProblemShape& shape = params.shape;

  const BackwardWork work(params, kColumns);
  const int batch = work.batch;
  const int first_key = work.key_tile * kColumns;
  const QueryTiles visible = visible_query_tiles(shape, params.window, first_key, kColumns, kRows);
  // Visits go through all query tiles of one head, then through the next head of the group.
  const int end_head = (work.kv_head + 1) * shape.heads_per_kv_head;
  Visit visit{end_head - shape.heads_per_kv_head, visible.begin};
  if (visible.begin == visible.end) visit.head = end_head;

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int score_row = warp % Config::kScoreWarps * 16 * Config::kScoreRowTiles;
  const int score_column = warp / Config::kScoreWarps * 8 * Config::kScoreColumnTiles;
  const int key_row = warp % Config::kKeyWarps * 16 * Config::kKeyRowTiles;
  const int key_column = warp / Config::kKeyWarps * 8 * Config::kKeyColumnTiles;
  const int query_row = warp % Config::kQueryWarps * 16 * Config::kQueryRowTiles;
  const int query_column = warp / Config::kQueryWarps * 8 * Config::kQueryColumnTiles;

  extern __shared__ __align__(1024) uint8_t shared_memory[];
  const Shared shared{ptx::shared_address(shared_memory)};

  const auto scratch_tile = [&](const Visit& visit) {
    return (static_cast<int64_t>(batch) * shape.heads + visit.head) * params.query_tiles + visit.tile;
  };
  const auto load_queries = [&](const Visit& visit, int stage) {
    const int head = visit.head, first_query = visit.tile * kRows;
    const int thread = ptx::thread_index();
    load_tile_async<kThreads>(shared.q(stage), matrix_of(params.q, batch, head), params.q.row_stride, first_query,
                              shape.seqlen_q, thread);
    load_tile_async<kThreads>(shared.dout(stage), matrix_of(params.dout, batch, head), params.dout.row_stride,
                              first_query, shape.seqlen_q, thread);
    constexpr int kVectorChunks = kRows / 4;
    static_assert(2 * kVectorChunks <= kThreads);
    if (thread < 2 * kVectorChunks) {
      const float* source = thread < kVectorChunks ? params.lse_log2 : params.delta;
      const int chunk = thread % kVectorChunks;
      const uint32_t target = thread < kVectorChunks ? shared.lse(stage) : shared.delta(stage);
      ptx::cp_async_16(target + chunk * 16, source + scratch_tile(visit) * kRows + chunk * 4, true);
    }
  };

  float dk[Config::kKeyRowTiles][Config::kKeyColumnTiles][4];
  float dv[Config::kKeyRowTiles][Config::kKeyColumnTiles][4];
  clear(dk);
  clear(dv);

  if (visit.head < end_head) {
    load_tile_async<kThreads>(shared.k(), matrix_of(params.k, batch, work.kv_head), params.k.row_stride, first_key,
                              shape.seqlen_k, thread);
    load_tile_async<kThreads>(shared.v(), matrix_of(params.v, batch, work.kv_head), params.v.row_stride, first_key,
                              shape.seqlen_k, thread);
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
    if (kStages > 1) load_next();

    float scores[Config::kScoreRowTiles][Config::kScoreColumnTiles][4];
    clear(scores);
    warp_gemm<Element, kHeadDim / 16, kHeadDim / 16>(scores, RowOperand{shared.q(stage), score_row, lanes.rows_first},
                                                     RowOperand{shared.k(), score_column, lanes.columns_first});
    float ds[Config::kScoreRowTiles][Config::kScoreColumnTiles][4];
    clear(ds);
    warp_gemm<Element, kHeadDim / 16, kHeadDim / 16>(ds, RowOperand{shared.dout(stage), score_row, lanes.rows_first},
                                                     RowOperand{shared.v(), score_column, lanes.columns_first});
    if (!is_clean(shape, params.window, first_query, kRows, first_key, kColumns)) {
      mask_scores(scores, shape, params.window, first_query + score_row + lane / 4,
                  first_key + score_column + 2 * (lane % 4));
    }
#pragma unroll
    for (int i = 0; i < Config::kScoreRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = score_row + 16 * i + 8 * half + lane / 4;
        const float lse = load_shared_float(shared.lse(stage) + row * 4);
        const float delta = load_shared_float(shared.delta(stage) + row * 4);
#pragma unroll
        for (int j = 0; j < Config::kScoreColumnTiles; ++j) {
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            scores[i][j][e] = ptx::exp2(fmaf(scores[i][j][e], params.softmax_scale_log2, -lse));
            ds[i][j][e] = scores[i][j][e] * (ds[i][j][e] - delta);
          }
        }
      }
    }
    store_fragments<Element>(shared.p(), scores, score_row, score_column, lane);
    store_fragments<Element>(shared.ds(), ds, score_row, score_column, lane);
    __syncthreads();  // P and dS are complete

    warp_gemm<Element, kRows / 16, kRows / 16>(
        dv, TransposedOperand{shared.p(), key_row / 16, lanes.columns_first},
        TransposedOperand{shared.dout(stage), key_column / 16, lanes.rows_first});
    {
      float dq[Config::kQueryRowTiles][Config::kQueryColumnTiles][4];
      clear(dq);
      warp_gemm<Element, kColumns / 16, kColumns / 16>(
          dq, RowOperand{shared.ds(), query_row, lanes.rows_first},
          TransposedOperand{shared.k(), query_column / 16, lanes.rows_first});
      float* accumulator = params.dq_accumulator + scratch_tile(visit) * (kRows * kHeadDim);
      if (params.dq_turn == nullptr) {
        add_to_accumulator<kThreads>(accumulator, dq, thread);
      } else {
        int* turn = params.dq_turn + scratch_tile(visit);
        const int mine = work.turn(visible_key_tiles(shape, params.window, first_query, kRows, kColumns));
        if (thread == 0) {
          while (ptx::load_acquire(turn) != mine) {
          }
        }
        __syncthreads();
        add_to_accumulator<kThreads>(accumulator, dq, thread);
        __threadfence();
        __syncthreads();
        if (thread == 0) ptx::add_release(turn, 1);
      }
    }
    warp_gemm<Element, kRows / 16, kRows / 16>(dk, TransposedOperand{shared.ds(), key_row / 16, lanes.columns_first},
                                               TransposedOperand{shared.q(stage), key_column / 16, lanes.rows_first});

    if (kStages == 1) {
      __syncthreads();  // nobody reads this visit's operands any more
      load_next();
    }
  }

  store_key_gradients<Element, Config>(params, shared, dk, dv);
}

}  // namespace flash_attn::sm80
