// Registers and named barriers of warpgroups (sm_90a).
#pragma once

namespace flash_attn::ptx {

constexpr int kWarpgroupThreads = 128;

// Gives registers of every thread of the warpgroup back to the block, or takes some, waiting until there are.
template <int kRegisters>
__device__ __forceinline__ void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void acquire_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// The barriers 1 to 15 of a block; 0 is __syncthreads. `threads` counts those that arrive and those that wait.
__device__ __forceinline__ void named_barrier_wait(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace flash_attn::ptx
