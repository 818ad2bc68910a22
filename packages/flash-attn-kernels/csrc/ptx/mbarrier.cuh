// Barriers in shared memory that count arrivals and bytes copied, and the fences that go with them (sm_90).
//
// A wait names the parity of the phase that it waits for. The phase that has parity 1 at the start counts as complete
// on a fresh barrier, so that who waits for an empty stage does not wait at first.
#pragma once

#include <cstdint>

#include "spin_limit.cuh"

namespace flash_attn::ptx {

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine; the block's own threads need a block barrier too.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and lets the phase wait for so many bytes of copies.
__device__ __forceinline__ void mbarrier_arrive_expecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ bool mbarrier_try_wait(uint32_t barrier, int parity) {
  uint32_t complete;
  asm volatile(
      "{\n.reg .pred complete;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
      "selp.u32 %0, 1, 0, complete;\n}\n"
      : "=r"(complete)
      : "r"(barrier), "r"(parity)
      : "memory");
  return complete != 0;
}

// `site` says who waits for what, should the wait be reported, see spin_limit.cuh.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, int parity, SpinSite site) {
  SpinLimit limit(site, parity);
  while (!mbarrier_try_wait(barrier, parity)) {
    if (limit.is_reached()) return;
  }
}

// Ordinary accesses to shared memory before this are ordered before those of the tensor cores and the copy engine
// that follow a barrier.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace flash_attn::ptx
