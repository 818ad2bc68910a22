// How dK and dV leave a block: rounded, through shared memory; or, where several blocks share the query heads of one
// key-value head, as fp32 parts that key_gradients_kernel adds up in a fixed order.
#pragma once

#include "../../ptx/special_registers.cuh"
#include "../launch.h"
#include "../params.h"
#include "../sequence.cuh"
#include "../shared_tile.cuh"
#include "../tile_copy.cuh"
#include "backward_work.cuh"

namespace flash_attn::sm80 {

// One matrix of parts: (splits, key rows, kv heads, head_dim), contiguous. The rows of a dense call count through.
template <int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void store_part(const BackwardParams& params, const BackwardWork& work, float* parts,
                                           int head_dim, const float (&fragments)[kRowTiles][kColumnTiles][4],
                                           int first_key, int row_count, int column, int lane) {
  const bool dense = params.keys.cu_seqlens == nullptr;
  const int kv_heads = params.shape.heads / params.shape.heads_per_kv_head;
  const int64_t rows = static_cast<int64_t>(params.keys.rows) * (dense ? params.shape.batch : 1);
  const int64_t first = work.split * rows + (dense ? static_cast<int64_t>(work.index) * params.keys.rows
                                                   : first_row(params.keys, work.index));
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = first_key + 16 * i + 8 * (e / 2) + lane / 4;
      if (row >= row_count) continue;
      float* target = parts + ((first + row) * kv_heads + work.kv_head) * head_dim;
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
        const int d = column + 8 * j + 2 * (lane % 4) + e % 2;
        if (d < head_dim) target[d] = fragments[i][j][e];
      }
    }
  }
}

// Indices are derived anew, so that they occupy no registers during the main loop. The caller has seen to it that
// nobody reads the tiles any more.
template <typename Element, typename Config, int kRowTiles, int kColumnTiles, int kValueColumnTiles>
__device__ __forceinline__ void store_key_gradients(const BackwardParams& params,
                                                    const typename Config::KeyTile& k_tile,
                                                    const typename Config::ValueTile& v_tile,
                                                    float (&dk)[kRowTiles][kColumnTiles][4],
                                                    const float (&dv)[kRowTiles][kValueColumnTiles][4]) {
  const BackwardWork work(params, Config::kColumns);
  const int stored = stored_rows(params.keys, params.shape.batch, work.index);
  const int first_key = work.key_tile * Config::kColumns;
  const int thread = ptx::thread_index(), lane = thread % 32, warp = thread / 32;
  const int row = warp % Config::kKeyWarps * 16 * kRowTiles;
  const int column = warp / Config::kKeyWarps * 8 * kColumnTiles;
  const int value_column = warp / Config::kKeyWarps * 8 * kValueColumnTiles;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) dk[i][j][e] *= params.softmax_scale;
  if (params.dk_partial != nullptr) {
    store_part(params, work, params.dk_partial, params.shape.head_dim, dk, first_key + row, stored, column, lane);
    store_part(params, work, params.dv_partial, params.shape.head_dim_v, dv, first_key + row, stored, value_column,
               lane);
    return;
  }
  store_fragments<Element>(k_tile, dk, row, column, lane);
  store_fragments<Element>(v_tile, dv, row, value_column, lane);
  __syncthreads();
  const int first = first_row(params.keys, work.index);
  const auto store = [&](const auto& tile, const TensorView& target, int head_dim) {
    store_tile<Config::kThreads, Config::kColumns, !Config::kGeneral>(
        tile, matrix_of(target, work.index, first, work.kv_head), target.row_stride, 0, first_key, stored, head_dim,
        thread);
  };
  store(k_tile, params.dk, params.shape.head_dim);
  store(v_tile, params.dv, params.shape.head_dim_v);
}

// Sum of the parts, rounded. Rows of the parts follow each other, those of the gradient are `row_stride` apart.
struct KeyGradientParams {
  const float* parts;
  void* gradient;
  int64_t elements;  // of the gradient
  int64_t row_stride;
  int row_elements;
  int splits;
};

template <typename Element>
__global__ void __launch_bounds__(256) key_gradients_kernel(const __grid_constant__ KeyGradientParams params) {
  const int64_t element = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (element >= params.elements) return;
  float sum = 0.f;
  for (int split = 0; split < params.splits; ++split) sum += params.parts[split * params.elements + element];
  const int64_t row = element / params.row_elements;
  const int64_t column = element - row * params.row_elements;
  static_cast<Element*>(params.gradient)[row * params.row_stride + column] = Element(sum);
}

// Of dK and dV, if they were made in parts. Sequences of a dense gradient follow each other like its rows.
template <typename Element>
void launch_key_gradients(const BackwardParams& params, const LaunchTarget& target) {
  if (params.dk_partial == nullptr) return;
  const int64_t rows = params.keys.rows * (params.keys.cu_seqlens == nullptr ? params.shape.batch : int64_t{1});
  const auto sum = [&](const float* parts, const TensorView& gradient, int head_dim) {
    const int row_elements = params.shape.heads / params.shape.heads_per_kv_head * head_dim;
    const int64_t elements = rows * row_elements;
    launch<&key_gradients_kernel<Element>>(
        (elements + 255) / 256, 256, 0, target,
        KeyGradientParams{parts, gradient.data, elements, gradient.row_stride, row_elements, params.group_splits});
  };
  sum(params.dk_partial, params.dk, params.shape.head_dim);
  sum(params.dv_partial, params.dv, params.shape.head_dim_v);
}

}  // namespace flash_attn::sm80
