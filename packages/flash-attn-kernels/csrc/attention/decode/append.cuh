// Writes new keys and values behind those in the cache, rotating keys and queries by their positions.
// Source of the rotation: Su et al., "RoFormer", 2021.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>

#include "../sequence.cuh"
#include "length.cuh"
#include "params.h"

namespace flash_attn::decode {

__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ void from_float(__nv_bfloat16& target, float x) { target = __float2bfloat16(x); }
__device__ __forceinline__ void from_float(__half& target, float x) { target = __float2half(x); }

__device__ __forceinline__ float number_at(const void* data, NumberType type, int64_t index) {
  if (type == NumberType::kFloat) return static_cast<const float*>(data)[index];
  if (type == NumberType::kHalf) return to_float(static_cast<const __half*>(data)[index]);
  return to_float(static_cast<const __nv_bfloat16*>(data)[index]);
}

// The sequence and the number in it of one row of a tensor.
struct RowPlace {
  int index, number;
  bool exists;

  __device__ __forceinline__ RowPlace(const RowLayout& layout, int batch, int row) {
    if (layout.cu_seqlens == nullptr) {
      index = row / layout.rows, number = row - index * layout.rows, exists = true;
      return;
    }
    int begin = 0, end = batch;  // the last sequence that begins at the row or before
    while (end - begin > 1) {
      const int middle = (begin + end) / 2;
      (layout.cu_seqlens[middle] <= row ? begin : end) = middle;
    }
    index = begin, number = row - layout.cu_seqlens[begin];
    exists = batch > 0 && number >= 0 && row < layout.cu_seqlens[begin + 1];
  }
};

// One warp copies one row; the first rotary_dim elements are rotated if `cos` is given.
template <typename Element>
__device__ __forceinline__ void copy_row(const AppendParams& params, Element* target, const Element* source,
                                         int head_dim, bool rotates, int position, int lane) {
  const int half = rotates ? params.rotary_dim / 2 : 0;
  const int angles = min(max(position, 0), params.rotary_rows - 1);  // positions past the table are refused by checks
  for (int i = lane; i < half; i += 32) {
    const int first = params.interleaved ? 2 * i : i, second = params.interleaved ? 2 * i + 1 : i + half;
    const int64_t angle = static_cast<int64_t>(angles) * half + i;
    const float cos = number_at(params.cos, params.rotary_type, angle);
    const float sin = number_at(params.sin, params.rotary_type, angle);
    const float x = to_float(source[first]), y = to_float(source[second]);
    from_float(target[first], x * cos - y * sin);
    from_float(target[second], x * sin + y * cos);
  }
  for (int i = 2 * half + lane; i < head_dim; i += 32) target[i] = source[i];
}

// Rows of a tensor (batch, row, head, dim), or packed.
__device__ __forceinline__ int64_t row_offset(const TensorView& view, const RowLayout& layout, int row,
                                              const RowPlace& place, int head) {
  return layout.cu_seqlens == nullptr
             ? place.index * view.batch_stride + place.number * view.row_stride + head * view.head_stride
             : row * view.row_stride + head * view.head_stride;
}

// Warps: all heads of k, then of v, of all new rows, then all heads of all queries.
template <typename Element>
__global__ void append_kernel(const __grid_constant__ AppendParams params) {
  const int lane = threadIdx.x % 32;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = thread; i < params.zeroed_count; i += threads) params.zeroed[i] = 0;
  for (int64_t i = thread; params.lengths_after != nullptr && i < params.batch; i += threads) {
    params.lengths_after[i] = length_of(params.cache, params.added, params.batch, static_cast<int>(i));
  }
  int64_t number = thread / 32;
  const int64_t added =
      (params.added.cu_seqlens == nullptr ? static_cast<int64_t>(params.batch) : 1) * params.added.rows;
  const int64_t queries =
      (params.queries.cu_seqlens == nullptr ? static_cast<int64_t>(params.batch) : 1) * params.queries.rows;
  if (number < 2 * added * params.kv_heads) {
    const bool is_value = number >= added * params.kv_heads;
    number -= is_value ? added * params.kv_heads : 0;
    const int row = static_cast<int>(number / params.kv_heads), head = static_cast<int>(number % params.kv_heads);
    const RowPlace place(params.added, params.batch, row);
    if (!place.exists) return;
    const CacheLayout& cache = params.cache;
    const int position = cache.lengths[place.index] + place.number;
    if (position < 0 || position >= cache.capacity) return;
    const int entry = cache.entries == nullptr ? place.index : cache.entries[place.index];
    const CachePlace target(cache, entry, position);
    if (target.page < 0) return;
    const TensorView& from = is_value ? params.v : params.k;
    const TensorView& to = is_value ? cache.v : cache.k;
    copy_row(params,
             static_cast<Element*>(to.data) + target.page * to.batch_stride + target.slot * to.row_stride +
                 head * to.head_stride,
             static_cast<const Element*>(from.data) + row_offset(from, params.added, row, place, head),
             is_value ? params.head_dim_v : params.head_dim, !is_value && params.cos != nullptr, position, lane);
    return;
  }
  number -= 2 * added * params.kv_heads;
  if (number >= queries * params.heads) return;
  const int row = static_cast<int>(number / params.heads), head = static_cast<int>(number % params.heads);
  const RowPlace place(params.queries, params.batch, row);
  const int position =
      place.exists ? params.cache.lengths[place.index] + (params.q_per_position ? place.number : 0) : 0;
  copy_row(params,
           static_cast<Element*>(params.q_out.data) + row_offset(params.q_out, params.queries, row, place, head),
           static_cast<const Element*>(params.q.data) + row_offset(params.q, params.queries, row, place, head),
           params.head_dim, params.cos != nullptr && place.exists, position, lane);
}

constexpr int kAppendThreads = 128;

inline int64_t append_blocks(const AppendParams& params) {
  const auto rows = [&](const RowLayout& layout) {
    return (layout.cu_seqlens == nullptr ? static_cast<int64_t>(params.batch) : 1) * layout.rows;
  };
  const int64_t warps = 2 * rows(params.added) * params.kv_heads + rows(params.queries) * params.heads;
  const bool has_more = params.zeroed_count > 0 || params.lengths_after != nullptr;
  return std::max<int64_t>((warps * 32 + kAppendThreads - 1) / kAppendThreads, has_more ? 1 : 0);
}

}  // namespace flash_attn::decode
