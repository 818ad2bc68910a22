// The fp32 accumulator of dQ in global memory, to which the blocks of all key tiles add.
//
// A tile of queries is stored in the order of the warps' accumulator fragments, not of its rows: a warp's addition
// then covers whole consecutive cache lines. On sm_90 a thread adds its four values in one instruction.
#pragma once

#include "../../ptx/global_sync.cuh"

namespace flash_attn::sm80 {

// Offset of element e of fragment `fragment` (row tile * column tiles + column tile) of a thread.
template <int kThreads>
__device__ __forceinline__ int accumulator_offset(int fragment, int e, int thread) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return (fragment * kThreads + thread) * 4 + e;
#else
  return (fragment * 4 + e) * kThreads + thread;
#endif
}

template <int kThreads, int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void add_to_accumulator(float* tile, const float (&fragments)[kRowTiles][kColumnTiles][4],
                                                   int thread) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
      ptx::global_add_4(tile + accumulator_offset<kThreads>(i * kColumnTiles + j, 0, thread), fragments[i][j]);
#else
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        ptx::global_add(tile + accumulator_offset<kThreads>(i * kColumnTiles + j, e, thread), fragments[i][j][e]);
      }
#endif
    }
  }
}

template <int kThreads, int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void load_from_accumulator(float (&fragments)[kRowTiles][kColumnTiles][4], const float* tile,
                                                      int thread) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        fragments[i][j][e] = tile[accumulator_offset<kThreads>(i * kColumnTiles + j, e, thread)];
}

}  // namespace flash_attn::sm80
