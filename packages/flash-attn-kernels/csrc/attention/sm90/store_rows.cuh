// Accumulator fragments to global memory without shared memory, so that no tile waits for its successor's place there.
#pragma once

#include <cstdint>

#include "../../ptx/convert.cuh"
#include "../shared_tile.cuh"

namespace flash_attn::sm90 {

// Thread t of a quad gives word i and gets word t of thread i.
__device__ __forceinline__ void transpose_quad(uint32_t (&words)[4], int lane) {
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    const bool upper = (lane & distance) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & distance) != 0) continue;
      const uint32_t received = __shfl_xor_sync(0xffffffffu, upper ? words[i] : words[i + distance], distance);
      if (upper) {
        words[i] = received;
      } else {
        words[i + distance] = received;
      }
    }
  }
}

struct RowCounts {
  int used;    // rows that have a result; it is 0 for those behind
  int stored;  // rows that there are
};

// Rounds the warp's 16 rows of fragments to 16 bits and writes them, and of their columns those below `head_dim`, a
// multiple of 8. `row` is the thread's first row; rows are aligned to 16 bytes.
template <typename Element, int kFragments>
__device__ __forceinline__ void store_rows(const float (&fragments)[kFragments][4], uint16_t* matrix,
                                           int64_t row_stride, int row, RowCounts rows, int head_dim, int lane) {
  static_assert(kFragments % 4 == 0);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint16_t* target = matrix + (row + 8 * half) * row_stride;
#pragma unroll
    for (int j = 0; j < kFragments; j += 4) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t word = ptx::pack<Element>(fragments[j + i][2 * half], fragments[j + i][2 * half + 1]);
        words[i] = row + 8 * half < rows.used ? word : 0;  // fragments of unused rows may be NaN
      }
      transpose_quad(words, lane);
      const int column = (j + lane % 4) * kChunkElements;
      if (row + 8 * half < rows.stored && column < head_dim) {
        *reinterpret_cast<uint4*>(target + column) = make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
}

}  // namespace flash_attn::sm90
