// Sets scores of invisible keys to minus infinity.
#pragma once

#include <cmath>

#include "params.h"

namespace flash_attn {

// `row` and `column` are the query and key of the thread's first element; fragments step by 16 rows and 8 columns,
// and hold (row, column), (row, column + 1), (row + 8, column), (row + 8, column + 1).
template <int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void mask_scores(float (&scores)[kRowTiles][kColumnTiles][4], const ProblemShape& shape,
                                            const Window& window, int row, int column) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int diagonal = row + 16 * i + 8 * half + shape.seqlen_k - shape.seqlen_q;
      const int last = min(shape.seqlen_k - 1, diagonal + window.right);
      const int first = diagonal - window.left;
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int key = column + 8 * j + e;
          if (key > last || key < first) scores[i][j][2 * half + e] = -INFINITY;
        }
      }
    }
  }
}

}  // namespace flash_attn
