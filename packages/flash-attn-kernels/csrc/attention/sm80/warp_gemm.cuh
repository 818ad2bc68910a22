// One warp's share of a matrix product between operands in shared memory or registers.
#pragma once

#include <cstdint>

#include "../../ptx/mma.cuh"
#include "../shared_tile.cuh"

namespace flash_attn::sm80 {

// Operand A of 16 x 16 blocks (i, k) from a row-major tile [m][k]: rows start at `row`.
template <typename Tile>
struct RowsA {
  Tile tile;
  int row;
  uint32_t lane_offset;  // LaneOffsets::rows_first

  __device__ __forceinline__ void load(uint32_t (&a)[4], int i, int k) const {
    ptx::ldmatrix_x4<false>(a, tile.block_address(row + 16 * i, k, lane_offset));
  }
};

// Operand A from a tile that stores its transpose [k][m]: m starts at 16 * column16.
template <typename Tile>
struct TransposedA {
  Tile tile;
  int column16;
  uint32_t lane_offset;  // LaneOffsets::columns_first

  __device__ __forceinline__ void load(uint32_t (&a)[4], int i, int k) const {
    ptx::ldmatrix_x4<true>(a, tile.block_address(16 * k, column16 + i, lane_offset));
  }
};

// Operand A rounded from the accumulators of an earlier product: two 8-column tiles are one 16 x 16 block.
template <typename Element, int kRowTiles, int kColumnTiles>
struct RegistersA {
  const float (&fragments)[kRowTiles][kColumnTiles][4];

  __device__ __forceinline__ void load(uint32_t (&a)[4], int i, int k) const {
    const auto& left = fragments[i][2 * k];
    const auto& right = fragments[i][2 * k + 1];
    a[0] = ptx::pack<Element>(left[0], left[1]);
    a[1] = ptx::pack<Element>(left[2], left[3]);
    a[2] = ptx::pack<Element>(right[0], right[1]);
    a[3] = ptx::pack<Element>(right[2], right[3]);
  }
};

// Operand B, 16 columns (two n8 tiles) of 16 deep blocks (j, k), from a tile [n][k]: n starts at `row`.
template <typename Tile>
struct RowsB {
  Tile tile;
  int row;
  uint32_t lane_offset;  // LaneOffsets::columns_first

  __device__ __forceinline__ void load(uint32_t (&b)[4], int j, int k) const {
    ptx::ldmatrix_x4<false>(b, tile.block_address(row + 16 * j, k, lane_offset));
  }
};

// Operand B from a tile [k][n]: n starts at 16 * column16.
template <typename Tile>
struct TransposedB {
  Tile tile;
  int column16;
  uint32_t lane_offset;  // LaneOffsets::rows_first

  __device__ __forceinline__ void load(uint32_t (&b)[4], int j, int k) const {
    ptx::ldmatrix_x4<true>(b, tile.block_address(16 * k, column16 + j, lane_offset));
  }
};

// accumulator[i][j] += A(i, k) B(j, k) over kDepthTiles blocks of depth 16, kUnroll of them scheduled together: more
// hide the loads better and take more registers. Operands in registers need the whole depth.
template <typename Element, int kDepthTiles, int kUnroll, int kRowTiles, int kColumnTiles, typename A, typename B>
__device__ __forceinline__ void warp_gemm(float (&accumulator)[kRowTiles][kColumnTiles][4], const A& a_operand,
                                          const B& b_operand) {
  static_assert(kColumnTiles % 2 == 0);
#pragma unroll kUnroll
  for (int k = 0; k < kDepthTiles; ++k) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) a_operand.load(a[i], i, k);
#pragma unroll
    for (int j = 0; j < kColumnTiles / 2; ++j) {
      uint32_t b[4];
      b_operand.load(b, j, k);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        ptx::mma_m16n8k16<Element>(accumulator[i][2 * j], a[i], b[0], b[1]);
        ptx::mma_m16n8k16<Element>(accumulator[i][2 * j + 1], a[i], b[2], b[3]);
      }
    }
  }
}

template <int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void clear(float (&accumulator)[kRowTiles][kColumnTiles][4]) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) accumulator[i][j][e] = 0.f;
}

}  // namespace flash_attn::sm80
