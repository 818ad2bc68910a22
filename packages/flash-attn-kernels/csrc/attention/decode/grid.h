// How many blocks the decode kernel is launched with, and the scratch that its parts of items need.
#pragma once

#include <algorithm>
#include <climits>
#include <cstdint>

#include "params.h"

namespace flash_attn::decode {

struct DecodeGrid {
  int64_t blocks;
  int64_t items;  // there are no more
  int64_t slots;  // 0: no item has parts
};

// Says in `params`, which has all but that, how the keys are cut into parts. num_splits 0 leaves it to this function.
template <typename Config>
DecodeGrid decode_grid(DecodeParams& params, int64_t num_splits, bool batch_invariant, int multiprocessors) {
  const int64_t batch = params.shape.batch, group = params.shape.heads_per_kv_head;
  if (group == 0) return {};
  const int64_t item_rows = params.queries.rows * group;
  const int64_t row_tiles = params.queries.cu_seqlens != nullptr
                                ? item_rows / Config::kRows + batch + 1
                                : batch * ((item_rows + Config::kRows - 1) / Config::kRows);
  const int64_t kv_heads = params.shape.heads / group, items = row_tiles * kv_heads;
  const int64_t key_tiles = (int64_t{params.cache.capacity} + Config::kColumns - 1) / Config::kColumns;
  params.num_splits = params.tiles_per_part = 0;
  params.items = static_cast<int>(std::min<int64_t>(items, INT_MAX));
  const auto ranges = [&](int64_t blocks) {
    return static_cast<int>(std::clamp<int64_t>(blocks / kv_heads, 1, Config::kMostParts));
  };
  // Blocks without work would be in the way of others, so that how many there are is decided here, by what there is
  // room for.
  params.ranges = ranges(multiprocessors);
  const bool small_pages = params.cache.page_table != nullptr && params.cache.page_size < Config::kLargePage;
  if (small_pages || row_tiles * key_tiles <= Config::kFewTiles * params.ranges) {
    params.ranges = ranges(int64_t{Config::kBlocksPerMultiprocessor} * multiprocessors);
  }
  if (batch_invariant) {
    constexpr int64_t kMostFixedParts = 16, kLeastTilesOfPart = 32;
    params.tiles_per_part =
        static_cast<int>(std::max((key_tiles + kMostFixedParts - 1) / kMostFixedParts, kLeastTilesOfPart));
    const int64_t parts = items * ((key_tiles + params.tiles_per_part - 1) / params.tiles_per_part + 1);
    return {parts, items, parts};
  }
  // Blocks count the tiles of the stream in 32 bits: many rows, which fill the device anyway, are not cut.
  if (num_splits == 0 && row_tiles * std::max<int64_t>(key_tiles, 1) > INT_MAX / 2) num_splits = 1;
  if (num_splits == 0) {
    const int64_t blocks = params.ranges * kv_heads;
    return {blocks, items, items == 0 ? 0 : 2 * blocks};
  }
  params.num_splits = static_cast<int>(std::min<int64_t>(num_splits, Config::kMostParts));
  const int64_t parts = items * std::min<int64_t>(params.num_splits, std::max<int64_t>(key_tiles, 1));
  return {parts, items, num_splits == 1 ? 0 : parts};
}

}  // namespace flash_attn::decode
