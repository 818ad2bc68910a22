// Block and thread indices that the compiler re-reads at every use instead of keeping in registers.
#pragma once

namespace flash_attn::ptx {

__device__ __forceinline__ int block_index() {
  int index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  return index;
}

__device__ __forceinline__ int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

}  // namespace flash_attn::ptx
