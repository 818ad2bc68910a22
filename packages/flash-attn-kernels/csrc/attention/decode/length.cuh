// How many keys a sequence has.
#pragma once

#include "../sequence.cuh"
#include "params.h"

namespace flash_attn::decode {

// With those that are appended in the same call, and with those that the cache has no room for.
__device__ __forceinline__ int length_of(const CacheLayout& cache, const RowLayout& added, int batch, int index) {
  const int before = min(max(cache.lengths[index], -Window::kUnbounded), Window::kUnbounded - 1);
  const int more = min(stored_rows(added, batch, index), Window::kUnbounded - 1);
  return min(max(before + more, 0), Window::kUnbounded);
}

}  // namespace flash_attn::decode
