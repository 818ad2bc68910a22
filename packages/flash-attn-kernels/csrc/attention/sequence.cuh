// Sequences of a batch, dense or packed, and the numbering of their tiles.
//
// Tiles of all sequences are numbered by slots. A dense sequence takes ceil(rows / tile_rows) slots. A packed one
// starts at slot floor(cu_seqlens[b] / tile_rows) + b, which leaves it at least as many slots as it has tiles: the
// host needs to know no length, and the device finds the sequence of a slot by a search. Superfluous slots see
// nothing. Rows behind the last packed sequence form one more, number `batch`, that has no keys.
#pragma once

#include "params.h"

namespace flash_attn {

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
// Division that rounds towards minus infinity, for tile indices computed from negative positions.
__host__ __device__ constexpr int floor_div(int a, int b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

inline int slot_count(const RowLayout& layout, int batch, int tile_rows) {
  if (layout.cu_seqlens == nullptr) return batch * ceil_div(layout.rows, tile_rows);
  return layout.rows / tile_rows + batch + 1;
}

// First row of sequence `index` in the tensors. Bad cumulative lengths never lead out of the tensor.
__device__ __forceinline__ int first_row(const RowLayout& layout, int index) {
  if (layout.cu_seqlens == nullptr || index == 0) return 0;
  return min(max(layout.cu_seqlens[index], 0), layout.rows);
}

__device__ __forceinline__ int first_slot(const RowLayout& layout, int index, int tile_rows) {
  if (layout.cu_seqlens == nullptr) return index * ceil_div(layout.rows, tile_rows);
  return first_row(layout, index) / tile_rows + index;
}

// Rows that the tensors hold for a sequence.
__device__ __forceinline__ int stored_rows(const RowLayout& layout, int batch, int index) {
  if (layout.cu_seqlens == nullptr) return layout.rows;
  const int end = index == batch ? layout.rows : first_row(layout, index + 1);
  return max(end - first_row(layout, index), 0);
}

// Whether what lies behind the rows that take part may be anything. Behind a whole tensor the copy engine finds zeros.
__device__ __forceinline__ bool has_rows_behind(const RowLayout& layout) {
  return layout.cu_seqlens != nullptr || layout.seqused != nullptr;
}

// Rows of it that take part.
__device__ __forceinline__ int used_rows(const RowLayout& layout, int batch, int index) {
  if (index == batch) return 0;
  const int stored = min(stored_rows(layout, batch, index), layout.capacity);
  return layout.seqused == nullptr ? stored : min(max(layout.seqused[index], 0), stored);
}

// Keys that windows are aligned by, of which `used` take part: a cache counts those too that it has no room for.
__device__ __forceinline__ int aligned_keys(const RowLayout& keys, int batch, int index, int used) {
  if (keys.cu_seqlens != nullptr || keys.seqused == nullptr || index == batch) return used;
  return min(max(keys.seqused[index], 0), kMaxSeqlen);
}

// Tile number `tile` of sequence `index`, which has `tiles` slots; 0 <= tile < tiles whatever cumulative lengths say.
struct Slot {
  int index, tile, tiles;

  // All lanes of a warp search together: 32 candidates at a time.
  __device__ __forceinline__ Slot(const RowLayout& layout, int batch, int tile_rows, int slot) {
    if (layout.cu_seqlens == nullptr) {
      tiles = ceil_div(layout.rows, tile_rows);
      index = slot / tiles;
      tile = slot % tiles;
      return;
    }
    const int lane = static_cast<int>(threadIdx.x) % 32;
    int candidates = batch + 1;
    index = 0;
    while (candidates > 1) {
      const int step = ceil_div(candidates, 32);
      const bool starts_before = lane * step < candidates && first_slot(layout, index + lane * step, tile_rows) <= slot;
      const int chosen = 31 - __clz(__ballot_sync(0xffffffffu, starts_before));  // the first one always does
      index += chosen * step;
      candidates = min(step, candidates - chosen * step);
    }
    const int first = first_slot(layout, index, tile_rows);
    const int end = index == batch ? layout.rows / tile_rows + batch + 1 : first_slot(layout, index + 1, tile_rows);
    tile = slot - first;
    tiles = end - first;
  }
};

// One sequence: where its rows are, and what its windows are measured from.
struct Sequence {
  int index;               // in the batch
  int first_q, first_k;    // rows of the tensors
  int seqlen_q, seqlen_k;  // rows that take part
  int shift;               // the key on whose diagonal query 0 lies

  Sequence() = default;
  __device__ __forceinline__ Sequence(const AttentionParams& params, int index_) : index(index_) {
    const int batch = params.shape.batch;
    first_q = first_row(params.queries, index);
    first_k = params.modifiers.pages.table == nullptr ? first_row(params.keys, index) : 0;
    seqlen_q = used_rows(params.queries, batch, index);
    seqlen_k = used_rows(params.keys, batch, index);
    shift = params.window.top_left ? 0 : aligned_keys(params.keys, batch, index, seqlen_k) - seqlen_q;
  }
};

// The 16-bit matrix of one sequence and head.
__device__ __forceinline__ uint16_t* matrix_of(const TensorView& view, int index, int first_row, int head) {
  return static_cast<uint16_t*>(view.data) + index * view.batch_stride + first_row * view.row_stride +
         head * view.head_stride;
}

// Where the log-sum-exp (or its gradient) of a sequence and head begins.
__device__ __forceinline__ int64_t lse_offset(const AttentionParams& params, const Sequence& sequence, int head) {
  return sequence.index * params.lse_batch_stride + head * params.lse_head_stride + sequence.first_q;
}

}  // namespace flash_attn
