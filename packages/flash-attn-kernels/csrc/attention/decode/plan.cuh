// Which part of the work a block does.
//
// An item is a tile of rows of one sequence and key-value head: row r is query r / G of the G heads that share the
// keys, head r % G. Tiles of keys of all items of a head form a stream that is cut into equal ranges, one for each
// block of that head: a block gets pieces of items. How long the stream is only the device knows: every block goes
// through the lengths. All heads are cut at the same places, and blocks of all heads run at the same time: keys of one
// position, which are neighbours in memory, are read together, which memory is up to a tenth faster at.
#pragma once

#include "../sequence.cuh"
#include "length.cuh"
#include "params.h"

namespace flash_attn::decode {

__device__ __forceinline__ int warp_sum(int value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// Sum of the values of lower lanes.
__device__ __forceinline__ int warp_prefix(int value, int lane) {
  int sum = value;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int lower = __shfl_up_sync(0xffffffffu, sum, distance);
    if (lane >= distance) sum += lower;
  }
  return sum - value;
}

// Packed rows behind the last sequence form one more, number `batch`, that has no keys.
__device__ __forceinline__ int sequence_count(const DecodeParams& params) {
  return params.shape.batch + (params.queries.cu_seqlens == nullptr ? 0 : 1);
}

// One sequence: its rows, and its tiles of keys that some query sees.
struct DecodeSequence {
  int first_query, queries;
  int first_key, last_key;  // that some query sees
  int shift;                // the key on whose diagonal query 0 lies
  int row_tiles;
  int tile_begin, tile_end;

  __device__ __forceinline__ DecodeSequence(const DecodeParams& params, int index, int tile_rows, int tile_keys) {
    const int batch = params.shape.batch;
    first_query = first_row(params.queries, index);
    queries = stored_rows(params.queries, batch, index);
    // What the cache has no room for is not there, but counts for the alignment.
    const int length = index == batch ? 0 : length_of(params.cache, params.added, batch, index);
    const int keys = min(length, params.cache.capacity);
    const int leftpad =
        params.cache.leftpad == nullptr || index == batch ? 0 : min(max(params.cache.leftpad[index], 0), keys);
    shift = params.window.top_left ? 0 : length - queries;
    row_tiles = ceil_div(queries * params.shape.heads_per_kv_head, tile_rows);
    first_key = max(leftpad, shift - params.window.left);
    last_key = min(keys - 1, queries - 1 + shift + params.window.right);
    tile_begin = first_key / tile_keys;
    tile_end = last_key < first_key ? tile_begin : last_key / tile_keys + 1;
  }

  __device__ __forceinline__ int tiles() const { return tile_end - tile_begin; }
};

// What a block does next.
struct Piece {
  int index;  // of the sequence
  int kv_head, row_tile, item;
  int tile_begin, tile_end;  // of keys
  int part, parts;           // of the item
  // Where parts are stored until the last of them merges all.
  int first_slot, later_slots, slot_step;

  __device__ __forceinline__ int slot(int number) const {
    return number == 0 ? first_slot : later_slots + (number - 1) * slot_step;
  }
};

// The pieces of one block. All lanes of a warp call its functions together; all warps get the same.
template <typename Config>
class DecodePlan {
 public:
  __device__ __forceinline__ DecodePlan(const DecodeParams& params, int block)
      : params_(params),
        kv_heads_(params.shape.heads / params.shape.heads_per_kv_head),
        kv_head_(block % kv_heads_),
        position_(block / kv_heads_),
        end_(position_ + 1) {
    if (!is_stream()) return;
    const int lane = threadIdx.x % 32;
    int tiles = 0;
    for (int index = lane; index < sequence_count(params); index += 32) tiles += units(sequence(index));
    range_ = max(ceil_div(warp_sum(tiles), params.ranges), Config::kLeastTiles);
    position_ *= range_, end_ = position_ + range_;
  }

  // False if there is no more.
  __device__ __forceinline__ bool next(Piece& piece) {
    if (position_ >= end_) return false;
    const int lane = threadIdx.x % 32;
    int first_unit = 0, first_row_tile = 0;
    for (int base = 0; base < sequence_count(params_); base += 32) {
      int count = 0, row_tiles = 0;
      if (base + lane < sequence_count(params_)) {
        const DecodeSequence candidate = sequence(base + lane);
        count = units(candidate), row_tiles = candidate.row_tiles;
      }
      const int begin = first_unit + warp_prefix(count, lane);
      const int row_tile = first_row_tile + warp_prefix(row_tiles, lane);
      const unsigned found = __ballot_sync(0xffffffffu, position_ >= begin && position_ < begin + count);
      if (found != 0) {
        const int source = __ffs(found) - 1;
        piece.index = base + source;
        place(piece, __shfl_sync(0xffffffffu, begin, source), __shfl_sync(0xffffffffu, row_tile, source));
        return piece.item < params_.items;  // or cumulative lengths fall, and count rows again and again
      }
      first_unit += warp_sum(count), first_row_tile += warp_sum(row_tiles);
    }
    return false;
  }

 private:
  __device__ __forceinline__ bool is_stream() const { return params_.num_splits == 0 && params_.tiles_per_part == 0; }
  __device__ __forceinline__ DecodeSequence sequence(int index) const {
    return DecodeSequence(params_, index, Config::kRows, Config::kColumns);
  }
  // Of the stream, or of the fixed parts, that one item takes: one at least, so that somebody writes its rows.
  __device__ __forceinline__ int units_of_item(const DecodeSequence& sequence) const {
    if (is_stream()) return max(sequence.tiles(), 1);
    if (params_.num_splits > 0) return max(min(params_.num_splits, sequence.tiles()), 1);
    return max(ceil_div(sequence.tile_end, params_.tiles_per_part) - sequence.tile_begin / params_.tiles_per_part, 1);
  }
  __device__ __forceinline__ int units(const DecodeSequence& sequence) const {
    return sequence.row_tiles * units_of_item(sequence);
  }

  // The piece at position_, in a sequence whose first unit and tile of rows are given; goes behind it.
  __device__ __forceinline__ void place(Piece& piece, int first_unit, int first_row_tile) {
    const DecodeSequence found = sequence(piece.index);
    const int per_item = units_of_item(found);
    piece.row_tile = (position_ - first_unit) / per_item;
    const int unit = position_ - first_unit - piece.row_tile * per_item;
    piece.kv_head = kv_head_;
    piece.item = (first_row_tile + piece.row_tile) * kv_heads_ + kv_head_;
    if (is_stream()) {
      const int item_begin = position_ - unit, item_end = item_begin + per_item;
      const int first_range = item_begin / range_;
      piece.part = position_ / range_ - first_range;
      piece.parts = (item_end - 1) / range_ - first_range + 1;
      // A block has at most two parts of items that are not wholly its own: of one that began before, and of one that
      // goes on behind.
      set_slots(piece, 2 * first_range + 1, 2 * (first_range + 1), 2);
      piece.tile_begin = found.tile_begin + unit;
      piece.tile_end = min(found.tile_end, piece.tile_begin + end_ - position_);
      position_ = min(item_end, end_);
      return;
    }
    piece.part = unit, piece.parts = per_item;
    set_slots(piece, position_ - unit, position_ - unit + 1, 1);
    if (params_.num_splits > 0) {  // equal parts, the first ones a tile longer
      const int size = found.tiles() / per_item, longer = found.tiles() % per_item;
      piece.tile_begin = found.tile_begin + unit * size + min(unit, longer);
      piece.tile_end = piece.tile_begin + size + (unit < longer ? 1 : 0);
    } else {
      const int number = found.tile_begin / params_.tiles_per_part + unit;
      piece.tile_begin = max(found.tile_begin, number * params_.tiles_per_part);
      piece.tile_end = min(found.tile_end, (number + 1) * params_.tiles_per_part);
    }
    position_ = end_;
  }

  __device__ __forceinline__ void set_slots(Piece& piece, int first, int later, int step) const {
    piece.first_slot = first * kv_heads_ + kv_head_, piece.later_slots = later * kv_heads_ + kv_head_;
    piece.slot_step = step * kv_heads_;
  }

  const DecodeParams& params_;
  const int kv_heads_, kv_head_;
  int range_ = 0;
  int position_, end_;
};

}  // namespace flash_attn::decode
