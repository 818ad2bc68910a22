// One tile of the output, as the producer describes it to the consumers.
#pragma once

#include "../sequence.cuh"
#include "../visible_range.cuh"
#include "forward_params.h"

namespace flash_attn::sm90 {

struct ForwardWork {
  static constexpr int kNone = -1;  // as head: there are no more tiles

  int head;
  int first_query;
  int stored;  // rows of the output that the sequence has
  Sequence sequence;
  TileRange range;  // of keys that some query of the tile sees
};

// All lanes of a warp call it together.
template <typename Config>
__device__ __forceinline__ ForwardWork work_at(const ForwardKernelParams& params, int position) {
  const ForwardParams& attention = params.attention;
  const TileOrder::Tile place = params.order.at(position);
  int head = place.matrix, index, tile;
  if (attention.queries.cu_seqlens == nullptr) {
    index = place.matrix / attention.shape.heads;
    head -= index * attention.shape.heads;
    tile = params.order.ranks - 1 - place.rank;
  } else {
    const Slot slot(attention.queries, attention.shape.batch, Config::kRows, place.rank);
    index = slot.index;
    tile = slot.tiles - 1 - slot.tile;
  }
  const int first_query = tile * Config::kRows;
  const Sequence sequence(attention, index);
  return {head, first_query, stored_rows(attention.queries, attention.shape.batch, index), sequence,
          visible_key_tiles(sequence, attention.window, first_query, Config::kRows, Config::kColumns)};
}

}  // namespace flash_attn::sm90
