// In which order a launch computes its tiles, and which block computes which.
//
// A matrix is the output of one head, of one sequence if dense and of all if packed; its tiles have ranks, the one of
// rank 0 comes first. Matrices are taken in sections. Inside a section all tiles of one rank come before those of the
// next: under a causal mask the longest first.
#pragma once

#include <algorithm>
#include <climits>
#include <cstdint>
#include <stdexcept>

#include "../params.h"
#include "../sequence.cuh"

namespace flash_attn::sm90 {

struct TileOrder {
  int matrices;
  int ranks;    // tiles of one matrix
  int section;  // matrices of one section

  __host__ __device__ constexpr int tiles() const { return matrices * ranks; }

  struct Tile {
    int matrix, rank;
  };

  // position in [0, tiles())
  __host__ __device__ constexpr Tile at(int position) const {
    const int first_matrix = position / (section * ranks) * section;
    const int in_section = position - first_matrix * ranks;
    const int width = section < matrices - first_matrix ? section : matrices - first_matrix;
    return {first_matrix + in_section % width, in_section / width};
  }
};

// The position that a block takes in its round number `round`, if no counter hands them out. Rounds are turned against
// each other, or where the ranks divide the blocks a block would get the same, perhaps shorter, rank again and again.
__host__ __device__ constexpr int static_position(int block, int blocks, int round) {
  constexpr int kTurn = 7;
  return round * blocks + (block + round * kTurn) % blocks;
}

// Whether tiles take differently long.
inline bool tiles_differ(const ForwardParams& params) {
  return params.queries.cu_seqlens != nullptr || params.keys.seqused != nullptr ||
         params.window.left != Window::kUnbounded || params.window.right != Window::kUnbounded;
}

// Whether blocks share out the tiles while they run, with a counter, because the tiles take differently long. If there
// are no more of them than blocks, each has one.
inline bool needs_tile_counter(const ForwardParams& params, int multiprocessors) {
  constexpr int kLeastRows = 128;  // of a tile
  const int64_t most_tiles =
      static_cast<int64_t>(slot_count(params.queries, params.shape.batch, kLeastRows)) * params.shape.heads;
  return tiles_differ(params) && most_tiles > multiprocessors;
}

// How many matrices one section has. Their keys and values are read again for every rank, so they should stay in the L2
// cache; within that limit, long sections balance best, because what comes last is short.
inline int section_matrices(const ForwardParams& params, int matrices, int ranks, int multiprocessors) {
  constexpr int64_t kCacheBytes = 32 << 20;
  constexpr int kTypicalRows = 4096;  // of a packed sequence, whose length nobody knows
  constexpr int kFewRows = 1024;
  const bool packed = params.queries.cu_seqlens != nullptr;
  if (!tiles_differ(params)) return 1;
  // Few keys are read from global memory for as long as they are computed with. Only if all ranks of a matrix run at
  // the same time do the loads of some run under the products of others.
  if (!packed && params.keys.rows <= kFewRows) return std::clamp(ceil_div(multiprocessors, ranks), 1, matrices);
  const int64_t rows = packed ? std::min(params.keys.rows, kTypicalRows) : params.keys.rows;
  const int64_t kv_head_bytes = std::max<int64_t>(rows * (params.shape.head_dim + params.shape.head_dim_v) * 2, 1);
  return static_cast<int>(
      std::clamp<int64_t>(kCacheBytes / kv_head_bytes * params.shape.heads_per_kv_head, 1, matrices));
}

inline TileOrder tile_order(const ForwardParams& params, int tile_rows, int multiprocessors) {
  const bool packed = params.queries.cu_seqlens != nullptr;
  const int64_t matrices = packed ? params.shape.heads : static_cast<int64_t>(params.shape.batch) * params.shape.heads;
  const int64_t ranks =
      packed ? slot_count(params.queries, params.shape.batch, tile_rows) : ceil_div(params.queries.rows, tile_rows);
  if (matrices * ranks > INT_MAX / 2) throw std::runtime_error("batch * heads * seqlen is too large for one launch");
  if (matrices * ranks == 0) return {0, 0, 1};
  return {static_cast<int>(matrices), static_cast<int>(ranks),
          section_matrices(params, static_cast<int>(matrices), static_cast<int>(ranks), multiprocessors)};
}

}  // namespace flash_attn::sm90
