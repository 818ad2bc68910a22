// One warp's share of a matrix product between operands in shared memory or registers.
#pragma once

#include <cstdint>

#include "../ptx/ldmatrix.cuh"
#include "../ptx/mma.cuh"
#include "shared_tile.cuh"

namespace flash_attn {

// Operands in shared memory deliver 16 x 16 blocks (i, k): rows (of A) or columns (of B) 16 i ..., depth 16 k .... The
// lane offset says in which order the block's four 8 x 8 matrices arrive, see LaneOffsets; that is all in which A and
// B differ.

// From a tile that stores [m][k] for A, [n][k] for B: m or n starts at `row`.
template <typename Tile>
struct RowOperand {
  Tile tile;
  int row;
  uint32_t lane_offset;  // rows_first for A, columns_first for B

  __device__ __forceinline__ void load(uint32_t (&fragment)[4], int i, int k) const {
    ptx::ldmatrix_x4<false>(fragment, tile.block_address(row + 16 * i, k, lane_offset));
  }
};

// From a tile that stores the transpose, [k][m] for A, [k][n] for B: m or n starts at 16 * column16.
template <typename Tile>
struct TransposedOperand {
  Tile tile;
  int column16;
  uint32_t lane_offset;  // columns_first for A, rows_first for B

  __device__ __forceinline__ void load(uint32_t (&fragment)[4], int i, int k) const {
    ptx::ldmatrix_x4<true>(fragment, tile.block_address(16 * k, column16 + i, lane_offset));
  }
};

// Operand A rounded from the accumulators of an earlier product: two 8-column tiles are one 16 x 16 block.
template <typename Element, int kRowTiles, int kColumnTiles>
struct RegisterOperand {
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

}  // namespace flash_attn
