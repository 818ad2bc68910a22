// Sets scores of keys outside the window or the sequence to minus infinity.
#pragma once

#include <cmath>

#include "params.h"
#include "sequence.cuh"

namespace flash_attn {

// The keys [first, last] that a query sees.
struct KeyBounds {
  int first, last;

  __device__ __forceinline__ KeyBounds(const Sequence& sequence, const Window& window, int query) {
    const int diagonal = query + sequence.shift;
    first = diagonal - window.left;
    last = min(sequence.seqlen_k - 1, diagonal + window.right);
  }
};

// `row` and `column` are the query and key of the thread's first element; fragments step by 16 rows and 8 columns,
// and hold (row, column), (row, column + 1), (row + 8, column), (row + 8, column + 1). kBegins: some row's first key
// may be in the tile, not only its last.
template <bool kBegins, int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void mask_scores(float (&scores)[kRowTiles][kColumnTiles][4], const Sequence& sequence,
                                            const Window& window, int row, int column) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const KeyBounds bounds(sequence, window, row + 16 * i + 8 * half);
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int key = column + 8 * j + e;
          if ((kBegins && key < bounds.first) || key > bounds.last) scores[i][j][2 * half + e] = -INFINITY;
        }
      }
    }
  }
}

}  // namespace flash_attn
