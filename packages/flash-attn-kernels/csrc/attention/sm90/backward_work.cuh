// What a block of the backward computes at a time: one tile of keys of one key-value head, or of a part of its group of
// query heads, with all tiles of queries that see it.
#pragma once

#include "../params.h"
#include "../sequence.cuh"
#include "../visible_range.cuh"

namespace flash_attn::sm90 {

// One query tile of one query head.
struct Visit {
  int head, tile;
};

template <typename Config>
struct BackwardWork {
  int kv_head, split, first_key;
  Sequence sequence;
  QueryTiles visible;
  int first_head, end_head;
  int first_query_slot;

  // All lanes of a warp together. `head_interleave` heads take turns: under a causal mask the first tiles of keys,
  // which most queries see, then come first.
  __device__ __forceinline__ BackwardWork(const BackwardParams& params, int position) {
    const int heads_together = params.head_interleave, group = params.shape.heads_per_kv_head;
    const int split_heads = params.shape.heads / group * params.group_splits;
    const int first = position / (heads_together * params.key_slots) * heads_together;
    const int among = min(heads_together, split_heads - first), rest = position - first * params.key_slots;
    const Slot slot(params.keys, params.shape.batch, Config::kColumns, rest / among);
    const int split_head = first + rest % among;
    split = split_head % params.group_splits;
    kv_head = split_head / params.group_splits;
    first_key = slot.tile * Config::kColumns;
    sequence = Sequence(params, slot.index);
    visible = visible_query_tiles(sequence, params.window, first_key, Config::kColumns, Config::kRows);
    first_head = kv_head * group + static_cast<int>(static_cast<int64_t>(split) * group / params.group_splits);
    end_head = kv_head * group + static_cast<int>(static_cast<int64_t>(split + 1) * group / params.group_splits);
    first_query_slot = first_slot(params.queries, slot.index, Config::kRows);
  }

  // Visits go through all query tiles of one head, then through the next head's.
  __device__ __forceinline__ int visits() const { return (end_head - first_head) * (visible.end - visible.begin); }
  __device__ __forceinline__ Visit first() const { return {first_head, visible.begin}; }
  __device__ __forceinline__ void advance(Visit& visit) const {
    if (++visit.tile == visible.end) {
      visit.tile = visible.begin;
      ++visit.head;
    }
  }

  // Number of a query tile among the scratch tiles.
  __device__ __forceinline__ int64_t scratch_tile(const BackwardParams& params, const Visit& visit) const {
    return static_cast<int64_t>(visit.head) * params.query_slots + first_query_slot + visit.tile;
  }
};

enum BackwardBarrier : int { kGradientsStored = 1, kSliceFull = 2, kSliceEmpty = 4, kTailCleared = 6 };

}  // namespace flash_attn::sm90
