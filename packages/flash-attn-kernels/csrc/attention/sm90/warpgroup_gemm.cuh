// The two products of attention on a warpgroup's tensor cores, from tiles in shared memory. They are on their way when
// a function returns: who commits and waits is its caller.
#pragma once

#include "../../ptx/convert.cuh"
#include "../../ptx/wgmma.cuh"
#include "../shared_tile.cuh"

namespace flash_attn::sm90 {

constexpr int kDepth = 16;  // of one instruction

// A tile whose rows are the rows of A, or the columns of B.
__device__ __forceinline__ uint64_t row_descriptor(uint32_t tile) { return ptx::MatrixDescriptor::make(tile, 16); }

// A tile whose rows are the rows of B.
template <typename Tile>
__device__ __forceinline__ uint64_t panel_descriptor(uint32_t tile) {
  return ptx::MatrixDescriptor::make(tile, Tile::kPanelBytes);
}

// D = A B^T: rows of two tiles of the same columns, the 64 of A that `a` begins with and all of B.
template <typename Element, typename TileA, typename TileB>
__device__ __forceinline__ void multiply_rows(float (&d)[TileB::kRows / 8][4], uint64_t a, uint64_t b) {
  constexpr int kPanelSteps = kPanelElements / kDepth, kStepBytes = kDepth * 2;
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < TileA::kColumns / kDepth; ++k) {
    const int panel = k / kPanelSteps, bytes = k % kPanelSteps * kStepBytes;
    const uint64_t step_a = a + (panel * TileA::kPanelBytes + bytes) / 16;
    const uint64_t step_b = b + (panel * TileB::kPanelBytes + bytes) / 16;
    if (k == 0) {
      ptx::Wgmma<TileB::kRows>::template ss<Element, false, false>(d, step_a, step_b);
    } else {
      ptx::Wgmma<TileB::kRows>::template ss<Element, false, true>(d, step_a, step_b);
    }
  }
}

// D += A B: A from registers, B all of a tile.
template <typename Element, typename TileB>
__device__ __forceinline__ void multiply_registers(float (&d)[TileB::kColumns / 8][4],
                                                   const uint32_t (&a)[TileB::kRows / kDepth][4], uint64_t b) {
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < TileB::kRows / kDepth; ++k) {
    ptx::Wgmma<TileB::kColumns>::template rs<Element, true, true>(d, a[k], b + k * kDepth * kRowBytes / 16);
  }
}

// Accumulator fragments, rounded, become the operand A: the layouts agree.
template <typename Element, int kSteps>
__device__ __forceinline__ void pack(uint32_t (&a)[kSteps][4], const float (&d)[2 * kSteps][4]) {
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float (&fragment)[4] = d[2 * k + i / 2];
      a[k][i] = ptx::pack<Element>(fragment[2 * (i % 2)], fragment[2 * (i % 2) + 1]);
    }
  }
}

template <int kFragments>
__device__ __forceinline__ void clear(float (&d)[kFragments][4]) {
#pragma unroll
  for (int j = 0; j < kFragments; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) d[j][e] = 0.f;
  }
}

}  // namespace flash_attn::sm90
