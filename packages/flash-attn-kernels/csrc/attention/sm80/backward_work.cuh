// What one block of the backward does: which keys it owns, which query tiles it visits, whose turn it is.
#pragma once

#include "../../ptx/special_registers.cuh"
#include "../params.h"
#include "../sequence.cuh"
#include "../visible_range.cuh"

namespace flash_attn::sm80 {

// In deterministic mode the key tiles add to a tile of dQ one after the other, in the order in which their blocks
// start: a block never waits for one that starts later. Blocks that start together and add to the same tiles would
// wait for each other, though: so `head_interleave` heads take turns in starting a block, and under a bounded right
// side the order of the key tiles is descending, so that the first query tile of a block is its own turn at once.
struct BackwardWork {
  bool descending;
  int index, kv_head, split, key_tile;

  __device__ __forceinline__ BackwardWork(const BackwardParams& params, int columns) {
    const int block = ptx::block_index(), heads_together = params.head_interleave;
    const int split_heads = params.shape.heads / params.shape.heads_per_kv_head * params.group_splits;
    const int first = block / (heads_together * params.key_slots) * heads_together;
    const int among = min(heads_together, split_heads - first), rest = block - first * params.key_slots;
    const Slot slot(params.keys, params.shape.batch, columns, rest / among);
    const int split_head = first + rest % among;
    split = split_head % params.group_splits;
    kv_head = split_head / params.group_splits;
    index = slot.index;
    descending = params.dq_turn != nullptr && params.window.right != Window::kUnbounded;
    key_tile = descending ? slot.tiles - 1 - slot.tile : slot.tile;
  }

  // The query heads [first_head, end_head) of the group that this block adds up.
  __device__ __forceinline__ int first_head(const BackwardParams& params) const { return head(params, split); }
  __device__ __forceinline__ int end_head(const BackwardParams& params) const { return head(params, split + 1); }

  // How many key tiles add to a query tile before this one does.
  __device__ __forceinline__ int turn(const TileRange& key_tiles) const {
    return descending ? key_tiles.end - 1 - key_tile : key_tile - key_tiles.begin;
  }

 private:
  __device__ __forceinline__ int head(const BackwardParams& params, int part) const {
    const int group = params.shape.heads_per_kv_head;
    return kv_head * group + static_cast<int>(static_cast<int64_t>(part) * group / params.group_splits);
  }
};

// One query tile of one query head. Visits go through all query tiles of one head, then through the next head's.
struct Visit {
  int head, tile;

  __device__ __forceinline__ void advance(const QueryTiles& visible) {
    if (++tile == visible.end) {
      tile = visible.begin;
      ++head;
    }
  }
};

// Number of a query tile among the scratch tiles.
__device__ __forceinline__ int64_t scratch_tile(const BackwardParams& params, int first_query_slot,
                                                const Visit& visit) {
  return static_cast<int64_t>(visit.head) * params.query_slots + first_query_slot + visit.tile;
}

}  // namespace flash_attn::sm80
