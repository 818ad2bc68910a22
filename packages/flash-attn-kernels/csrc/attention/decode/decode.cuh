// Attention of few queries to many cached keys: limited by the bandwidth of global memory and by nothing else.
//
// The query heads that share a key-value head are rows of one tile, so that keys are read once for all of them. Keys
// are cut into parts that different blocks see; the block that ends last merges the parts of an item.
// Source: Dao et al., "Flash-Decoding for long-context inference", 2023.
#pragma once

#include <cmath>

#include "../../ptx/convert.cuh"
#include "../../ptx/cp_async.cuh"
#include "../../ptx/shared_memory.cuh"
#include "../mask.cuh"
#include "../score_modifiers.cuh"
#include "../softmax.cuh"
#include "../warp_gemm.cuh"
#include "config.h"
#include "params.h"
#include "plan.cuh"

namespace flash_attn::decode {

// Where 16 keys that a warp loads next lie: lane l knows key l % 16.
struct KeyPlaces {
  int page;  // or entry of the cache; -1: there is no such key
  int slot;

  __device__ __forceinline__ KeyPlaces(const CacheLayout& cache, const DecodeSequence& sequence, int entry, int key)
      : page(-1), slot(0) {
    if (key < sequence.first_key || key > sequence.last_key) return;
    const CachePlace place(cache, entry, key);
    page = place.page, slot = place.slot;
  }
};

// Starts the copy of 16 rows; rows that do not exist, and columns past the head dim, become zeros.
template <typename Tile>
__device__ __forceinline__ void load_rows_async(const Tile& tile, const TensorView& view, const KeyPlaces& places,
                                                int head, int head_dim, int lane) {
  constexpr int kChunks = Tile::kPanels * kPanelChunks;
  const uint16_t* data = static_cast<const uint16_t*>(view.data) + head * view.head_stride;
#pragma unroll
  for (int i = lane; i < Tile::kRows * kChunks; i += 32) {
    const int row = i / kChunks, chunk = i % kChunks;
    const int page = __shfl_sync(0xffffffffu, places.page, row), slot = __shfl_sync(0xffffffffu, places.slot, row);
    const bool valid = page >= 0 && chunk * kChunkElements < head_dim;
    const uint16_t* source =
        valid ? data + page * view.batch_stride + slot * view.row_stride + chunk * kChunkElements : data;
    ptx::cp_async_16(tile.chunk_address(row, chunk), source, valid);
  }
}

// The query and head of a row of an item.
struct ItemRow {
  int query, head;
  bool exists;

  __device__ __forceinline__ ItemRow(const DecodeParams& params, const DecodeSequence& sequence, int kv_head, int row) {
    const int group = params.shape.heads_per_kv_head;
    query = row / group;
    head = kv_head * group + row - query * group;
    exists = query < sequence.queries;
  }
};

// A part of an item, or all of it: unnormalised rows of the output with the maxima and sums that belong to them. The
// maxima are of base-2 scores.
template <typename Config>
struct MergeBuffer {
  float* out;  // (warps, rows, head dim of v)
  float* maximum;
  float* sum;  // (warps, rows)

  __device__ __forceinline__ explicit MergeBuffer(uint8_t* shared)
      : out(reinterpret_cast<float*>(shared)),
        maximum(out + Config::kWarps * Config::kRows * Config::kHeadDimV),
        sum(maximum + Config::kWarps * Config::kRows) {}
};

// Writes 8 columns of one row of the output.
template <typename Element>
__device__ __forceinline__ void store_row_chunk(const DecodeParams& params, const Piece& piece,
                                                const DecodeSequence& sequence, const ItemRow& row, int column,
                                                const float (&values)[8]) {
  if (column >= params.shape.head_dim_v) return;
  uint16_t* target =
      matrix_of(params.out, piece.index, sequence.first_query, row.head) + row.query * params.out.row_stride + column;
  uint4 words;
  words.x = ptx::pack<Element>(values[0], values[1]);
  words.y = ptx::pack<Element>(values[2], values[3]);
  words.z = ptx::pack<Element>(values[4], values[5]);
  words.w = ptx::pack<Element>(values[6], values[7]);
  *reinterpret_cast<uint4*>(target) = words;
}

__device__ __forceinline__ void store_lse(const DecodeParams& params, const Piece& piece,
                                          const DecodeSequence& sequence, const ItemRow& row, float lse) {
  params.lse[piece.index * params.lse_batch_stride + row.head * params.lse_head_stride + sequence.first_query +
             row.query] = lse;
}

// What a row whose base-2 log-sum-exp is known is scaled by for the sink, and its natural log-sum-exp.
struct Normalised {
  float factor, lse;

  __device__ __forceinline__ Normalised(const DecodeParams& params, const Piece& piece, int head, float lse_log2) {
    const bool has_sink = params.learnable_sink != nullptr && piece.index < params.shape.batch;
    const float sink = has_sink ? params.learnable_sink[head] * kLog2e : -INFINITY;
    if (lse_log2 == -INFINITY && sink == -INFINITY) {
      factor = 0.f, lse = -INFINITY;
      return;
    }
    const float top = fmaxf(lse_log2, sink);
    const float total = top + __log2f(ptx::exp2(lse_log2 - top) + ptx::exp2(sink - top));
    factor = sink == -INFINITY ? 1.f : ptx::exp2(lse_log2 - total);
    lse = (sink == -INFINITY ? lse_log2 : total) * (1.f / kLog2e);
  }
};

// Keys [tile_begin, tile_end) of one item: the unnormalised output, maxima and sums of every warp go to the buffer.
template <typename Element, typename Config>
__device__ __forceinline__ void attend(const DecodeParams& params, const Piece& piece, const DecodeSequence& sequence,
                                       uint8_t* shared, uint32_t (&visible_keys)[Config::kWarps][Config::kStages],
                                       const MergeBuffer<Config>& buffer) {
  using KeyTile = typename Config::KeyTile;
  using ValueTile = typename Config::ValueTile;
  constexpr int kOutTiles = Config::kHeadDimV / 8;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const CacheLayout& cache = params.cache;
  const int entry =
      cache.entries == nullptr || piece.index == params.shape.batch ? piece.index : cache.entries[piece.index];
  const int first_row = piece.row_tile * Config::kRows;
  const typename Config::QueryTile q_tile{ptx::shared_address(shared)};
  const uint32_t warp_area = q_tile.base + Config::QueryTile::kBytes + warp * Config::kStages * Config::kStageBytes;
  const auto key_tile = [&](int stage) { return KeyTile{warp_area + stage * Config::kStageBytes}; };
  const auto value_tile = [&](int stage) {
    return ValueTile{warp_area + stage * Config::kStageBytes + KeyTile::kBytes};
  };

  constexpr int kQueryChunks = Config::QueryTile::kPanels * kPanelChunks;
  for (int i = threadIdx.x; i < Config::kRows * kQueryChunks; i += Config::kThreads) {
    const int chunk = i % kQueryChunks;
    const ItemRow row(params, sequence, piece.kv_head, first_row + i / kQueryChunks);
    const bool valid = row.exists && chunk * kChunkElements < params.shape.head_dim;
    const uint16_t* source = static_cast<const uint16_t*>(params.q.data);
    if (valid) {
      source = matrix_of(params.q, piece.index, sequence.first_query, row.head) + row.query * params.q.row_stride +
               chunk * kChunkElements;
    }
    ptx::cp_async_16(q_tile.chunk_address(i / kQueryChunks, chunk), source, valid);
  }
  ptx::cp_async_commit();

  // Keys of step n are those of tile tile_begin + n that belong to the warp. What is loaded when a step begins was
  // looked up in the page table a step earlier.
  const int steps = piece.tile_end - piece.tile_begin;
  const auto places_of = [&](int step) {
    return KeyPlaces(cache, sequence, entry,
                     step < steps ? (piece.tile_begin + step) * Config::kColumns + warp * Config::kWarpKeys + lane % 16
                                  : sequence.last_key + 1);
  };
  const auto load = [&](int step, const KeyPlaces& places) {
    if (step < steps) {
      const int stage = step % Config::kStages;
      const unsigned exist = __ballot_sync(0xffffffffu, places.page >= 0);
      if (lane == 0) visible_keys[warp][stage] = exist;
      load_rows_async(key_tile(stage), cache.k, places, piece.kv_head, params.shape.head_dim, lane);
      load_rows_async(value_tile(stage), cache.v, places, piece.kv_head, params.shape.head_dim_v, lane);
    }
    ptx::cp_async_commit();
  };
  KeyPlaces places = places_of(0);
#pragma unroll
  for (int step = 0; step < Config::kStages - 1; ++step) {
    load(step, places);
    places = places_of(step + 1);
  }
  ptx::cp_async_wait<Config::kStages - 1>();
  __syncthreads();  // the queries are there

  const ItemRow rows[2] = {ItemRow(params, sequence, piece.kv_head, first_row + lane / 4),
                           ItemRow(params, sequence, piece.kv_head, first_row + lane / 4 + 8)};
  const int shift = sequence.shift;
  const LaneOffsets lanes(lane);
  float out[1][kOutTiles][4];
  clear(out);
  OnlineSoftmax<1> softmax;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<Config::kStages - 2>();
    __syncwarp();
    load(step + Config::kStages - 1, places);  // into the stage that the step before has left
    places = places_of(step + Config::kStages);
    const int stage = step % Config::kStages;
    float scores[1][2][4];
    clear(scores);
    warp_gemm<Element, Config::kHeadDim / 16, Config::kHeadDim / 16>(
        scores, RowOperand{q_tile, 0, lanes.rows_first}, RowOperand{key_tile(stage), 0, lanes.columns_first});
    const int column = (piece.tile_begin + step) * Config::kColumns + warp * Config::kWarpKeys + 2 * (lane % 4);
    if (params.softcap > 0.f) {
      soft_cap(scores, SoftCap(params.softmax_scale_log2, params.softcap), [](int, int, int, float) {});
    } else {
      for_each_element<1, 2>([&](int i, int j, int e) { scores[i][j][e] *= params.softmax_scale_log2; });
    }
    const uint32_t exist = visible_keys[warp][stage] >> (2 * (lane % 4));
    for_each_element<1, 2>([&](int i, int j, int e) {
      const ItemRow& row = rows[e / 2];
      const int key = column + 8 * j + e % 2, diagonal = row.query + shift;
      float& score = scores[i][j][e];
      if (params.alibi_slopes != nullptr && row.exists) {
        const float slope = params.alibi_slopes[piece.index * params.alibi_batch_stride + row.head] * kLog2e;
        score = fmaf(-slope, static_cast<float>(abs(diagonal - key)), score);
      }
      const bool exists = (exist >> (8 * j + e % 2)) & 1;
      if (!exists || key < diagonal - params.window.left || key > diagonal + params.window.right) score = -INFINITY;
    });
    softmax.template update<true>(scores, out, 1.f);
    warp_gemm<Element, 1, 1>(out, RegisterOperand<Element, 1, 2>{scores},
                             TransposedOperand{value_tile(stage), 0, lanes.rows_first});
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // nobody reads keys or values any more: the buffer takes their place
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    float sum = softmax.sum[half];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (lane % 4 == 0) {
      buffer.maximum[warp * Config::kRows + row] = softmax.maximum[half];
      buffer.sum[warp * Config::kRows + row] = sum;
    }
    float* target = buffer.out + (warp * Config::kRows + row) * Config::kHeadDimV + 2 * (lane % 4);
#pragma unroll
    for (int j = 0; j < kOutTiles; ++j) {
      *reinterpret_cast<float2*>(target + 8 * j) = make_float2(out[0][j][2 * half], out[0][j][2 * half + 1]);
    }
  }
  __syncthreads();
}

// The rows of the item that exist, eight columns at a time: function(tile row, its query and head, column).
template <typename Config, typename Function>
__device__ __forceinline__ void for_each_chunk(const DecodeParams& params, const Piece& piece,
                                               const DecodeSequence& sequence, const Function& function) {
  constexpr int kRowChunks = Config::kHeadDimV / 8;
  for (int i = threadIdx.x; i < Config::kRows * kRowChunks; i += Config::kThreads) {
    const int tile_row = i / kRowChunks;
    const ItemRow row(params, sequence, piece.kv_head, piece.row_tile * Config::kRows + tile_row);
    if (row.exists) function(tile_row, row, i % kRowChunks * 8);
  }
}

// What is subtracted from exponents whose largest is `top`: there may be none, and yet sums that are no numbers, which
// must stay in sight.
__device__ __forceinline__ float exponent_shift(float top) { return top == -INFINITY ? 0.f : top; }

// Merges what the warps have: into the output, or into the piece's slot if the item has other parts.
template <typename Element, typename Config>
__device__ __forceinline__ void merge_warps(const DecodeParams& params, const Piece& piece,
                                            const DecodeSequence& sequence, const MergeBuffer<Config>& buffer) {
  const int64_t first_slot_row = int64_t{piece.slot(piece.part)} * Config::kRows;
  for_each_chunk<Config>(params, piece, sequence, [&](int tile_row, const ItemRow& row, int column) {
    float top = -INFINITY;
    bool is_empty = true;
#pragma unroll
    for (int w = 0; w < Config::kWarps; ++w) {
      top = fmaxf(top, buffer.maximum[w * Config::kRows + tile_row]);
      is_empty &= buffer.sum[w * Config::kRows + tile_row] == 0.f;
    }
    float total = 0.f, values[8] = {};
    if (!is_empty) {
#pragma unroll
      for (int w = 0; w < Config::kWarps; ++w) {
        const float weight = ptx::exp2(buffer.maximum[w * Config::kRows + tile_row] - exponent_shift(top));
        total = fmaf(weight, buffer.sum[w * Config::kRows + tile_row], total);
        const float* source = buffer.out + (w * Config::kRows + tile_row) * Config::kHeadDimV + column;
#pragma unroll
        for (int c = 0; c < 8; ++c) values[c] = fmaf(weight, source[c], values[c]);
      }
      const float inverse = __fdividef(1.f, total);
#pragma unroll
      for (int c = 0; c < 8; ++c) values[c] *= inverse;
    }
    const float lse_log2 = is_empty ? -INFINITY : top + __log2f(total);
    if (piece.parts > 1) {
      float4* target =
          reinterpret_cast<float4*>(params.out_partial + (first_slot_row + tile_row) * Config::kHeadDimV + column);
      target[0] = make_float4(values[0], values[1], values[2], values[3]);
      target[1] = make_float4(values[4], values[5], values[6], values[7]);
      if (column == 0) params.lse_partial[first_slot_row + tile_row] = lse_log2;
      return;
    }
    const Normalised normalised(params, piece, row.head, lse_log2);
#pragma unroll
    for (int c = 0; c < 8; ++c) values[c] *= normalised.factor;
    store_row_chunk<Element>(params, piece, sequence, row, column, values);
    if (column == 0) store_lse(params, piece, sequence, row, normalised.lse);
  });
}

// Base-2 log-sum-exps of all parts of an item's rows, (rows, parts), for merge_parts(): read by all threads at once.
template <typename Config>
__device__ __forceinline__ void load_part_lse(const DecodeParams& params, const Piece& piece,
                                              const DecodeSequence& sequence, float* part_lse) {
  for (int i = threadIdx.x; i < Config::kRows * piece.parts; i += Config::kThreads) {
    const int tile_row = i / piece.parts, part = i - tile_row * piece.parts;
    const ItemRow row(params, sequence, piece.kv_head, piece.row_tile * Config::kRows + tile_row);
    if (row.exists) {
      part_lse[i] = __ldcg(params.lse_partial + int64_t{piece.slot(part)} * Config::kRows + tile_row);
    }
  }
}

// Merges all parts of an item into the output.
template <typename Element, typename Config>
__device__ __forceinline__ void merge_parts(const DecodeParams& params, const Piece& piece,
                                            const DecodeSequence& sequence, const float* part_lse) {
  for_each_chunk<Config>(params, piece, sequence, [&](int tile_row, const ItemRow& row, int column) {
    const float* const lse = part_lse + tile_row * piece.parts;
    float top = -INFINITY;
    bool is_empty = true;
    for (int part = 0; part < piece.parts; ++part) {
      top = fmaxf(top, lse[part]);
      is_empty &= lse[part] == -INFINITY;
    }
    float total = 0.f, values[8] = {};
    if (!is_empty) {
#pragma unroll 8
      for (int part = 0; part < piece.parts; ++part) {
        const float weight = ptx::exp2(lse[part] - exponent_shift(top));
        const int64_t slot_row = int64_t{piece.slot(part)} * Config::kRows + tile_row;
        const float4* source =
            reinterpret_cast<const float4*>(params.out_partial + slot_row * Config::kHeadDimV + column);
        const float4 low = __ldcg(source), high = __ldcg(source + 1);
        const float parts[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        total += weight;
#pragma unroll
        for (int c = 0; c < 8; ++c) values[c] = fmaf(weight, parts[c], values[c]);
      }
    }
    const Normalised normalised(params, piece, row.head, is_empty ? -INFINITY : top + __log2f(total));
    const float factor = is_empty ? 0.f : __fdividef(normalised.factor, total);
#pragma unroll
    for (int c = 0; c < 8; ++c) values[c] *= factor;
    store_row_chunk<Element>(params, piece, sequence, row, column, values);
    if (column == 0) store_lse(params, piece, sequence, row, normalised.lse);
  });
}

template <typename Element, typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerMultiprocessor)
    decode_kernel(const __grid_constant__ DecodeParams params) {
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ bool is_last;
  __shared__ uint32_t visible_keys[Config::kWarps][Config::kStages];  // one bit for each key of a warp's tile
  const MergeBuffer<Config> buffer(shared + Config::QueryTile::kBytes);
  DecodePlan<Config> plan(params, blockIdx.x);
  Piece piece;
  while (plan.next(piece)) {
    const DecodeSequence sequence(params, piece.index, Config::kRows, Config::kColumns);
    attend<Element>(params, piece, sequence, shared, visible_keys, buffer);
    merge_warps<Element>(params, piece, sequence, buffer);
    if (piece.parts > 1) {
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) is_last = atomicAdd(params.finished_parts + piece.item, 1) == piece.parts - 1;
      __syncthreads();
      if (is_last) {
        __threadfence();
        float* const part_lse = reinterpret_cast<float*>(shared);
        load_part_lse<Config>(params, piece, sequence, part_lse);
        __syncthreads();
        merge_parts<Element, Config>(params, piece, sequence, part_lse);
      }
    }
    __syncthreads();  // before the next piece overwrites the buffer
  }
}

}  // namespace flash_attn::decode
