// Copies of tensor tiles to shared memory by the copy engine (sm_90).
#pragma once

#include <cuda.h>

#include <cstdint>

namespace flash_attn::ptx {

// How long the L2 cache should keep what a copy reads. The encodings are those that the CUDA headers define for
// createpolicy's results with fraction 1.
enum class CachePolicy : uint64_t { kEvictFirst = 0x12F0000000000000, kEvictLast = 0x14F0000000000000 };

__device__ __forceinline__ void tma_prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Starts the copy of one box, whose first element has the coordinates (column, row, head, batch), to shared memory.
// Elements outside the tensor become zeros. Its bytes count towards the barrier.
__device__ __forceinline__ void tma_load(uint32_t shared, const CUtensorMap& map, uint32_t barrier, int column, int row,
                                         int head, int batch, CachePolicy policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared),
      "l"(&map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch), "l"(static_cast<uint64_t>(policy))
      : "memory");
}

}  // namespace flash_attn::ptx
