// Additions to and ordering through global memory between thread blocks.
#pragma once

namespace flash_attn::ptx {

__device__ __forceinline__ void global_add(float* address, float value) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(address), "f"(value) : "memory");
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
// One 16-byte reduction; the address must be 16-byte aligned.
__device__ __forceinline__ void global_add_4(float* address, const float (&value)[4]) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(value[0]), "f"(value[1]),
               "f"(value[2]), "f"(value[3])
               : "memory");
}
#endif

// Waits by relaxed loads, because every acquiring one would empty the L1 cache; the last one acquires.
__device__ __forceinline__ void wait_until_equal(const int* address, int expected) {
  int value;
  do {
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  } while (value != expected);
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
}

__device__ __forceinline__ void add_release(int* address, int value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

}  // namespace flash_attn::ptx
