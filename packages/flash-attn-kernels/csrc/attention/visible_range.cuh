// Which tiles of keys a tile of queries can see, and the reverse.
#pragma once

#include "params.h"
#include "sequence.cuh"

namespace flash_attn {

// Tiles [begin, end) contain everything visible; of them [clean_begin, clean_end) need no mask at all.
struct TileRange {
  int begin, clean_begin, clean_end, end;
};

// Key tiles of `columns` keys seen by queries [query, query + rows).
__device__ __forceinline__ TileRange visible_key_tiles(const Sequence& sequence, const Window& window, int query,
                                                       int rows, int columns) {
  const int diagonal = query + sequence.shift;
  TileRange range;
  range.begin = max(0, floor_div(diagonal - window.left, columns));
  range.end = min(ceil_div(sequence.seqlen_k, columns), floor_div(diagonal + rows - 1 + window.right, columns) + 1);
  if (query >= sequence.seqlen_q) range.end = range.begin;
  range.clean_end = min(sequence.seqlen_k / columns, floor_div(diagonal + window.right + 1, columns));
  range.clean_begin = -floor_div(-(diagonal + rows - 1 - window.left), columns);
  range.clean_begin = min(max(range.clean_begin, range.begin), range.end);
  range.clean_end = min(max(range.clean_end, range.clean_begin), range.end);
  return range;
}

// Query tiles [begin, end) of `rows` queries whose visible_key_tiles() contain the tile of keys [key, key + columns).
struct QueryTiles {
  int begin, end;
};

__device__ __forceinline__ QueryTiles visible_query_tiles(const Sequence& sequence, const Window& window, int key,
                                                          int columns, int rows) {
  const int diagonal = key - sequence.shift;  // the query on whose diagonal the first key lies
  QueryTiles tiles;
  tiles.begin = max(0, floor_div(diagonal - window.right, rows));
  tiles.end = min(ceil_div(sequence.seqlen_q, rows), floor_div(diagonal + columns - 1 + window.left, rows) + 1);
  if (key >= sequence.seqlen_k) tiles.end = tiles.begin;
  tiles.end = max(tiles.begin, tiles.end);
  return tiles;
}

// Whether every query of a tile sees every key of a tile, so that no mask is needed.
__device__ __forceinline__ bool is_clean(const Sequence& sequence, const Window& window, int query, int rows, int key,
                                         int columns) {
  const int diagonal = query + sequence.shift;
  return key + columns <= sequence.seqlen_k && key + columns - 1 <= diagonal + window.right &&
         key >= diagonal + rows - 1 - window.left;
}

}  // namespace flash_attn
