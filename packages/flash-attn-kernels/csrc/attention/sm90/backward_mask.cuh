// Sets transposed scores, rows of which are keys, of keys outside the window or the sequence to minus infinity.
#pragma once

#include <cmath>

#include "../params.h"
#include "../sequence.cuh"

namespace flash_attn::sm90 {

// `key` and `query` are those of the thread's first element; fragments step by 8 queries and hold (key, query),
// (key, query + 1), (key + 8, query), (key + 8, query + 1). kBegins: some query's first key may be in the tile, not
// only its last.
template <bool kBegins, int kFragments>
__device__ __forceinline__ void mask_transposed(float (&scores)[kFragments][4], const Sequence& sequence,
                                                const Window& window, int key, int query) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int diagonal = key + 8 * half - sequence.shift - query;
    const int first = key + 8 * half < sequence.seqlen_k ? diagonal - window.right : Window::kUnbounded;
    const int last = diagonal + window.left;
#pragma unroll
    for (int j = 0; j < kFragments; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (8 * j + e < first || (kBegins && 8 * j + e > last)) scores[j][2 * half + e] = -INFINITY;
      }
    }
  }
}

}  // namespace flash_attn::sm90
