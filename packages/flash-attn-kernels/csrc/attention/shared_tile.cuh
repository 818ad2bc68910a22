// Tiles of 16-bit elements in shared memory and their fragments.
//
// A tile is cut into panels 64 elements (128 bytes) wide. Inside a panel the 16-byte chunk c of row r is stored at
// chunk c ^ (r % 8): eight rows of one chunk column then lie in eight different bank groups, so ldmatrix, its
// transposed form and the fragment stores are free of bank conflicts. Bases must be 128-byte aligned.
#pragma once

#include <cstdint>

#include "../ptx/convert.cuh"

namespace flash_attn {

constexpr int kChunkElements = 8;  // 16 bytes
constexpr int kPanelChunks = 8;
constexpr int kPanelElements = 64;  // 128 bytes
constexpr int kRowBytes = 128;

template <int kRows_, int kColumns_>
struct SharedTile {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static_assert(kColumns % 16 == 0 && kRows % 16 == 0);
  static constexpr int kPanels = (kColumns + kPanelElements - 1) / kPanelElements;
  static constexpr int kPanelBytes = kRows * kRowBytes;
  static constexpr int kBytes = kPanels * kPanelBytes;

  uint32_t base;  // shared-memory address

  __device__ __forceinline__ uint32_t chunk_address(int row, int chunk) const {
    return base + (chunk / 8) * kPanelBytes + row * kRowBytes + (((chunk % 8) ^ (row % 8)) * 16);
  }

  // Address for an ldmatrix of the 16x16 block at (row, 16 * column16), given the lane's offset in such a block.
  __device__ __forceinline__ uint32_t block_address(int row, int column16, uint32_t lane_offset) const {
    return base + (column16 / 4) * kPanelBytes + row * kRowBytes + (lane_offset ^ ((column16 % 4) * 32));
  }
};

// Where a lane points inside a 16x16 block, for the two orders in which ldmatrix can deliver its four 8x8 matrices.
struct LaneOffsets {
  uint32_t rows_first;     // (0,0), (8,0), (0,8), (8,8): operand A of rows, operand B of transposed rows
  uint32_t columns_first;  // (0,0), (0,8), (8,0), (8,8): operand B of rows, operand A of transposed rows

  // The empty asm hides the lane from the optimiser, so that a loop body recomputes its handful of addresses instead
  // of keeping them in registers across iterations: accumulators leave none to spare.
  __device__ __forceinline__ explicit LaneOffsets(int lane) {
    asm volatile("" : "+r"(lane));
    rows_first = (lane % 16) * kRowBytes + (((lane / 16) ^ (lane % 8)) * 16);
    columns_first = (lane % 8 + (lane / 16) * 8) * kRowBytes + ((((lane / 8) % 2) ^ (lane % 8)) * 16);
  }
};

// Rounds accumulator fragments to 16 bits and stores them at (row, column) of a tile; lane in [0, 32).
template <typename Element, typename Tile, int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void store_fragments(const Tile& tile, const float (&fragments)[kRowTiles][kColumnTiles][4],
                                                int row, int column, int lane) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t address = tile.chunk_address(row + 16 * i + 8 * half + lane / 4, column / 8 + j);
        const uint32_t value = ptx::pack<Element>(fragments[i][j][2 * half], fragments[i][j][2 * half + 1]);
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(address + (lane % 4) * 4), "r"(value) : "memory");
      }
    }
  }
}

}  // namespace flash_attn
