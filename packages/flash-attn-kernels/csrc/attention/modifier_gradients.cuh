// Gradients of the bias and of the ALiBi slopes, from the gradient dS of the modified scores.
#pragma once

#include "../ptx/convert.cuh"
#include "../ptx/global_sync.cuh"
#include "params.h"
#include "score_modifiers.cuh"

namespace flash_attn {

// Rounds `pair` to the bias's 16-bit type.
__device__ __forceinline__ uint32_t pack_bias(float low, float high, BiasType type) {
  return type == BiasType::kBFloat16 ? ptx::pack<__nv_bfloat16>(low, high) : ptx::pack<__half>(low, high);
}

// Adds dS to the gradient of the bias of one (sequence, head); or stores it, where every score has its own entry.
template <int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void add_bias_gradient(const BackwardParams& params, int index, int head,
                                                  const float (&ds)[kRowTiles][kColumnTiles][4],
                                                  const FragmentOrigin& origin) {
  const ScorePlane plane(params.dbias, index, head);
  const BiasType type = params.modifiers.bias_type;
  if (params.dbias_is_stored && type != BiasType::kFloat && plane.columns % 2 == 0) {
    uint16_t* data = static_cast<uint16_t*>(params.dbias.data);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = origin.row + 16 * i + 8 * half;
        uint16_t* target = data + plane.at(row, origin.column);
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) {
          if (!plane.contains(row, origin.column + 8 * j)) continue;
          *reinterpret_cast<uint32_t*>(target + 8 * j) = pack_bias(ds[i][j][2 * half], ds[i][j][2 * half + 1], type);
        }
      }
    }
    return;
  }
  for_each_element<kRowTiles, kColumnTiles>([&](int i, int j, int e) {
    const int row = origin.row + 16 * i + 8 * (e / 2), column = origin.column + 8 * j + e % 2;
    if (!plane.contains(row, column)) return;
    const int64_t offset = plane.at(row, column);
    if (!params.dbias_is_stored) {
      if (ds[i][j][e] != 0.f) ptx::global_add(static_cast<float*>(params.dbias.data) + offset, ds[i][j][e]);
    } else if (type == BiasType::kFloat) {
      static_cast<float*>(params.dbias.data)[offset] = ds[i][j][e];
    } else {
      static_cast<uint16_t*>(params.dbias.data)[offset] = static_cast<uint16_t>(pack_bias(ds[i][j][e], 0.f, type));
    }
  });
}

// A warp's part of the slope gradient -sum dS * distance of one head.
struct SlopeGradient {
  float sum = 0.f;

  // Writes the sum of the warp to its own place and starts again.
  __device__ __forceinline__ void flush(const BackwardParams& params, int head, int key_slot, int warp, int warps) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (threadIdx.x % 32 == 0) {
      params.slope_partial[(static_cast<int64_t>(head) * params.key_slots + key_slot) * warps + warp] = sum;
    }
    sum = 0.f;
  }
};

}  // namespace flash_attn
