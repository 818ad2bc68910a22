// Everything that changes scores between q k^T and the softmax, apart from windows: soft-capping, bias, ALiBi, masks.
//
// One pass over a thread's fragments for each modifier that a call has, so that the passes are free of branches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

#include "../ptx/convert.cuh"
#include "../ptx/shared_memory.cuh"
#include "params.h"
#include "sequence.cuh"
#include "tile_copy.cuh"

namespace flash_attn {

constexpr float kLog2e = 1.4426950408889634f;

// Where a thread's fragments of a tile of scores lie. Element (i, j, e) is 16 i + 8 (e / 2) rows and 8 j + e % 2
// columns from the first one.
struct FragmentOrigin {
  int tile_row, tile_column;  // in the tile
  int row, column;            // in the sequence: query and key

  __device__ __forceinline__ FragmentOrigin(int warp_row, int warp_column, int lane, int first_query, int first_key)
      : tile_row(warp_row + lane / 4),
        tile_column(warp_column + 2 * (lane % 4)),
        row(first_query + tile_row),
        column(first_key + tile_column) {}
};

// Calls function(i, j, e) for every element, unrolled.
template <int kRowTiles, int kColumnTiles, typename Function>
__device__ __forceinline__ void for_each_element(const Function& function) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) function(i, j, e);
}

// A broadcastable tensor at one (sequence, head).
struct ScorePlane {
  int64_t offset;  // in elements
  int64_t row_stride, column_stride;
  int rows, columns;

  __device__ __forceinline__ ScorePlane(const ScoreTensor& tensor, int index, int head)
      : offset(index * tensor.batch_stride + head * tensor.head_stride),
        row_stride(tensor.row_stride),
        column_stride(tensor.column_stride),
        rows(tensor.rows),
        columns(tensor.columns) {}

  __device__ __forceinline__ bool contains(int row, int column) const { return row < rows && column < columns; }
  __device__ __forceinline__ int64_t at(int row, int column) const {
    return offset + row * row_stride + column * column_stride;
  }
};

__device__ __forceinline__ float2 unpack_bias(uint32_t pair, BiasType type) {
  return type == BiasType::kBFloat16 ? ptx::unpack<__nv_bfloat16>(pair) : ptx::unpack<__half>(pair);
}

// Soft-capping of products q k: scores are softcap * tanh(scale * product / softcap).
struct SoftCap {
  float factor, cap;  // of the exponent, and of the scores in base 2

  __device__ __forceinline__ SoftCap(float softmax_scale_log2, float softcap)
      : factor(softmax_scale_log2 * 2.f / softcap), cap(softcap * kLog2e) {}

  // tanh(x) = 1 - 2 / (1 + exp(2 x)): as exact as fp32 scores are, unlike tanh.approx.
  __device__ __forceinline__ float tanh(float product) const {
    return 1.f - __fdividef(2.f, 1.f + ptx::exp2(product * factor));
  }
};

// Products q k become soft-capped scores in base 2; `slope` is called with (i, j, e) and d(score) / d(scale * product).
template <int kRowTiles, int kColumnTiles, typename Slope>
__device__ __forceinline__ void soft_cap(float (&scores)[kRowTiles][kColumnTiles][4], const SoftCap& soft_cap,
                                         const Slope& slope) {
  for_each_element<kRowTiles, kColumnTiles>([&](int i, int j, int e) {
    const float tanh = soft_cap.tanh(scores[i][j][e]);
    scores[i][j][e] = soft_cap.cap * tanh;
    slope(i, j, e, 1.f - tanh * tanh);
  });
}

// Modifies the scores of one sequence and head.
class ScoreModifier {
 public:
  __device__ __forceinline__ ScoreModifier(const AttentionParams& params, const Sequence& sequence, int head)
      : params_(params), modifiers_(params.modifiers), index_(sequence.index), head_(head), shift_(sequence.shift) {}

  // Starts copying the bias of a tile to shared memory, where apply() finds it; other biases it reads from global
  // memory, element by element.
  template <int kThreads, typename Tile>
  __device__ __forceinline__ void load_bias_async(const Tile& tile, int first_query, int first_key, int thread) const {
    if (!modifiers_.bias_is_staged) return;
    const ScorePlane plane(modifiers_.bias, index_, head_);
    const uint16_t* data = static_cast<const uint16_t*>(modifiers_.bias.data) + plane.at(0, first_key);
    load_tile_async<kThreads>(tile, AlignedRows(data, plane.row_stride, plane.rows, plane.columns - first_key),
                              first_query, thread);
  }

  // Products q k become scores in base 2, -inf where a mask hides. `slopes` gets d(score) / d(scale * product) if the
  // scores are soft-capped.
  template <typename Tile, int kRowTiles, int kColumnTiles>
  __device__ __forceinline__ void apply(float (&scores)[kRowTiles][kColumnTiles][4],
                                        float (&slopes)[kRowTiles][kColumnTiles][4], const FragmentOrigin& origin,
                                        const Tile& bias_tile) const {
    if (modifiers_.softcap > 0.f) {
      soft_cap(scores, SoftCap(params_.softmax_scale_log2, modifiers_.softcap),
               [&](int i, int j, int e, float slope) { slopes[i][j][e] = slope; });
    } else {
      for_each_element<kRowTiles, kColumnTiles>(
          [&](int i, int j, int e) { scores[i][j][e] *= params_.softmax_scale_log2; });
    }
    if (modifiers_.bias_is_staged) {
      add_staged_bias(scores, origin, bias_tile);
    } else if (modifiers_.bias.present) {
      add_bias(scores, origin);
    }
    if (modifiers_.alibi_slopes != nullptr) {
      const float slope = modifiers_.alibi_slopes[index_ * modifiers_.alibi_batch_stride + head_] * kLog2e;
      for_each_element<kRowTiles, kColumnTiles>(
          [&](int i, int j, int e) { scores[i][j][e] = fmaf(-slope, distance(origin, i, j, e), scores[i][j][e]); });
    }
    if (modifiers_.mask.present) hide(scores, origin, modifiers_.mask);
    if (modifiers_.key_padding.present) hide(scores, origin, modifiers_.key_padding);
  }

  // How far a key is from the query's diagonal: the factor of the ALiBi slope.
  __device__ __forceinline__ float distance(const FragmentOrigin& origin, int i, int j, int e) const {
    return static_cast<float>(abs(origin.row + shift_ - origin.column + 16 * i + 8 * (e / 2) - 8 * j - e % 2));
  }

 private:
  template <typename Tile, int kRowTiles, int kColumnTiles>
  __device__ __forceinline__ void add_staged_bias(float (&scores)[kRowTiles][kColumnTiles][4],
                                                  const FragmentOrigin& origin, const Tile& tile) const {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) {
          const uint32_t address = tile.chunk_address(origin.tile_row + 16 * i + 8 * half, origin.tile_column / 8 + j);
          const float2 bias =
              unpack_bias(ptx::load_shared_word(address + origin.tile_column % 8 * 2), modifiers_.bias_type);
          scores[i][j][2 * half] = fmaf(bias.x, kLog2e, scores[i][j][2 * half]);
          scores[i][j][2 * half + 1] = fmaf(bias.y, kLog2e, scores[i][j][2 * half + 1]);
        }
      }
    }
  }

  template <int kRowTiles, int kColumnTiles>
  __device__ __forceinline__ void add_bias(float (&scores)[kRowTiles][kColumnTiles][4],
                                           const FragmentOrigin& origin) const {
    const ScorePlane plane(modifiers_.bias, index_, head_);
    for_each_element<kRowTiles, kColumnTiles>([&](int i, int j, int e) {
      const int row = origin.row + 16 * i + 8 * (e / 2), column = origin.column + 8 * j + e % 2;
      if (!plane.contains(row, column)) return;
      const float bias = modifiers_.bias_type == BiasType::kFloat
                             ? static_cast<const float*>(modifiers_.bias.data)[plane.at(row, column)]
                             : unpack_bias(static_cast<const uint16_t*>(modifiers_.bias.data)[plane.at(row, column)],
                                           modifiers_.bias_type)
                                   .x;
      scores[i][j][e] = fmaf(bias, kLog2e, scores[i][j][e]);
    });
  }

  template <int kRowTiles, int kColumnTiles>
  __device__ __forceinline__ void hide(float (&scores)[kRowTiles][kColumnTiles][4], const FragmentOrigin& origin,
                                       const ScoreTensor& mask) const {
    const ScorePlane plane(mask, index_, head_);
    const uint8_t* data = static_cast<const uint8_t*>(mask.data);
    for_each_element<kRowTiles, kColumnTiles>([&](int i, int j, int e) {
      const int row = origin.row + 16 * i + 8 * (e / 2), column = origin.column + 8 * j + e % 2;
      if (!plane.contains(row, column) || data[plane.at(row, column)] == 0) scores[i][j][e] = -INFINITY;
    });
  }

  const AttentionParams& params_;
  const ModifierParams& modifiers_;
  const int index_, head_, shift_;
};

}  // namespace flash_attn
