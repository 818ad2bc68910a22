// Copies of consecutive bytes by the copy engine, and its additions to global memory (sm_90). Addresses and sizes are
// multiples of 16 bytes.
#pragma once

#include <cstdint>

#include "tma.cuh"

namespace flash_attn::ptx {

// The bytes count towards the barrier.
__device__ __forceinline__ void bulk_load(uint32_t shared, const void* global, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
               "l"(global), "r"(bytes), "r"(barrier)
               : "memory");
}

// Adds floats in shared memory to floats in global memory.
__device__ __forceinline__ void bulk_add(float* global, uint32_t shared, int bytes, CachePolicy policy) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.L2::cache_hint.add.f32 [%0], [%1], %2, %3;" ::"l"(global),
      "r"(shared), "r"(bytes), "l"(static_cast<uint64_t>(policy))
      : "memory");
}

__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until the thread's committed additions have read shared memory, or until they are done.
__device__ __forceinline__ void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

}  // namespace flash_attn::ptx
