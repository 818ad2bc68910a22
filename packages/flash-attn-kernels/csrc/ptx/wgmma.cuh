// Products of a warpgroup's matrices, D[64 x N] (+)= A[64 x 16] B[16 x N]: asynchronous, 16-bit operands, fp32 sums.
//
// A warpgroup is four neighbouring warps, the first one's number a multiple of 4. Row 16 w + r of D belongs to its warp
// w, whose lanes hold it as those of mma_m16n8k16 do: d[j] is the fragment of columns [8 j, 8 j + 8).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace flash_attn::ptx {

// Orders what ordinary instructions did to accumulators and operand registers before the products that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending of the most recent groups are still computing.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Tells the compiler that registers change here, so that it moves no use of them across: it does not know that
// products which are on their way write or read them.
template <int kFragments>
__device__ __forceinline__ void pin(float (&d)[kFragments][4]) {
#pragma unroll
  for (int j = 0; j < kFragments; ++j) {
    asm volatile("" : "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])::"memory");
  }
}

template <int kFragments>
__device__ __forceinline__ void pin(uint32_t (&a)[kFragments][4]) {
#pragma unroll
  for (int j = 0; j < kFragments; ++j) {
    asm volatile("" : "+r"(a[j][0]), "+r"(a[j][1]), "+r"(a[j][2]), "+r"(a[j][3])::"memory");
  }
}

// Describes a matrix of 128-byte rows in shared memory with the 128-byte swizzle (see shared_tile.cuh) to the tensor
// cores. Moving it by bytes / 16 moves the matrix. PTX ISA, "Matrix descriptor".
struct MatrixDescriptor {
  // 8 rows are 1024 bytes. leading_bytes: from one panel to the next where B is transposed; otherwise without meaning.
  static __device__ __forceinline__ uint64_t make(uint32_t address, uint32_t leading_bytes) {
    constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
    constexpr uint64_t kEightRows = uint64_t{1024 >> 4} << 32;
    return kSwizzle128 | kEightRows | uint64_t{(leading_bytes >> 4) & 0x3fff} << 16 | ((address >> 4) & 0x3fff);
  }
};

// For each N: wgmma_ss(d, a, b) with A and B in shared memory and wgmma_rs(d, a, b) with A in registers, fragment j of
// 16 columns as mma_m16n8k16 takes it. kTransposed: B is stored as rows of its 16, not of its N. Without kAccumulate D
// is overwritten.
template <int N>
struct Wgmma;

#define FLASH_ATTN_D8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FLASH_ATTN_D16 FLASH_ATTN_D8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define FLASH_ATTN_D24 FLASH_ATTN_D16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define FLASH_ATTN_D32 FLASH_ATTN_D24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define FLASH_ATTN_D40 FLASH_ATTN_D32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define FLASH_ATTN_D48 FLASH_ATTN_D40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define FLASH_ATTN_D56 FLASH_ATTN_D48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define FLASH_ATTN_D64 FLASH_ATTN_D56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define FLASH_ATTN_D72 FLASH_ATTN_D64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define FLASH_ATTN_D80 FLASH_ATTN_D72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define FLASH_ATTN_D88 FLASH_ATTN_D80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define FLASH_ATTN_D96 FLASH_ATTN_D88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define FLASH_ATTN_D104 FLASH_ATTN_D96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define FLASH_ATTN_D112 FLASH_ATTN_D104 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define FLASH_ATTN_D120 FLASH_ATTN_D112 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define FLASH_ATTN_D128 FLASH_ATTN_D120 ", %120, %121, %122, %123, %124, %125, %126, %127"

#define FLASH_ATTN_O(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define FLASH_ATTN_O2(j) FLASH_ATTN_O(j), FLASH_ATTN_O(j + 1)
#define FLASH_ATTN_OPERANDS16 FLASH_ATTN_O2(0)
#define FLASH_ATTN_OPERANDS32 FLASH_ATTN_OPERANDS16, FLASH_ATTN_O2(2)
#define FLASH_ATTN_OPERANDS48 FLASH_ATTN_OPERANDS32, FLASH_ATTN_O2(4)
#define FLASH_ATTN_OPERANDS64 FLASH_ATTN_OPERANDS48, FLASH_ATTN_O2(6)
#define FLASH_ATTN_OPERANDS80 FLASH_ATTN_OPERANDS64, FLASH_ATTN_O2(8)
#define FLASH_ATTN_OPERANDS96 FLASH_ATTN_OPERANDS80, FLASH_ATTN_O2(10)
#define FLASH_ATTN_OPERANDS112 FLASH_ATTN_OPERANDS96, FLASH_ATTN_O2(12)
#define FLASH_ATTN_OPERANDS128 FLASH_ATTN_OPERANDS112, FLASH_ATTN_O2(14)
#define FLASH_ATTN_OPERANDS144 FLASH_ATTN_OPERANDS128, FLASH_ATTN_O2(16)
#define FLASH_ATTN_OPERANDS160 FLASH_ATTN_OPERANDS144, FLASH_ATTN_O2(18)
#define FLASH_ATTN_OPERANDS176 FLASH_ATTN_OPERANDS160, FLASH_ATTN_O2(20)
#define FLASH_ATTN_OPERANDS192 FLASH_ATTN_OPERANDS176, FLASH_ATTN_O2(22)
#define FLASH_ATTN_OPERANDS208 FLASH_ATTN_OPERANDS192, FLASH_ATTN_O2(24)
#define FLASH_ATTN_OPERANDS224 FLASH_ATTN_OPERANDS208, FLASH_ATTN_O2(26)
#define FLASH_ATTN_OPERANDS240 FLASH_ATTN_OPERANDS224, FLASH_ATTN_O2(28)
#define FLASH_ATTN_OPERANDS256 FLASH_ATTN_OPERANDS240, FLASH_ATTN_O2(30)

#define FLASH_ATTN_WGMMA_ASM(N, TYPE, D, A, B, ACCUMULATE, TAIL)                                                    \
  "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, " ACCUMULATE                                                  \
  ", 0;\n"                                                                                                          \
  "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" D "}, " A ", " B ", accumulate, 1, 1, " TAIL \
  ";\n}\n"

// P0 to P6 are the numbers of the operands that follow the N / 2 accumulators.
#define FLASH_ATTN_WGMMA(N, D, OPERANDS, P0, P1, P2, P3, P4, P5, P6)                                      \
  template <>                                                                                             \
  struct Wgmma<N> {                                                                                       \
    template <typename Element, bool kTransposed, bool kAccumulate>                                       \
    static __device__ __forceinline__ void ss(float (&d)[N / 8][4], uint64_t a, uint64_t b) {             \
      if constexpr (std::is_same_v<Element, __nv_bfloat16>) {                                             \
        asm volatile(FLASH_ATTN_WGMMA_ASM(N, "bf16", D, P0, P1, P2, "0, " P3)                             \
                     : OPERANDS                                                                           \
                     : "l"(a), "l"(b), "n"(int(kAccumulate)), "n"(int(kTransposed)));                     \
      } else {                                                                                            \
        asm volatile(FLASH_ATTN_WGMMA_ASM(N, "f16", D, P0, P1, P2, "0, " P3)                              \
                     : OPERANDS                                                                           \
                     : "l"(a), "l"(b), "n"(int(kAccumulate)), "n"(int(kTransposed)));                     \
      }                                                                                                   \
    }                                                                                                     \
    template <typename Element, bool kTransposed, bool kAccumulate>                                       \
    static __device__ __forceinline__ void rs(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b) { \
      if constexpr (std::is_same_v<Element, __nv_bfloat16>) {                                             \
        asm volatile(FLASH_ATTN_WGMMA_ASM(N, "bf16", D, "{" P0 ", " P1 ", " P2 ", " P3 "}", P4, P5, P6)   \
                     : OPERANDS                                                                           \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(kAccumulate)),         \
                       "n"(int(kTransposed)));                                                            \
      } else {                                                                                            \
        asm volatile(FLASH_ATTN_WGMMA_ASM(N, "f16", D, "{" P0 ", " P1 ", " P2 ", " P3 "}", P4, P5, P6)    \
                     : OPERANDS                                                                           \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(kAccumulate)),         \
                       "n"(int(kTransposed)));                                                            \
      }                                                                                                   \
    }                                                                                                     \
  };

FLASH_ATTN_WGMMA(64, FLASH_ATTN_D32, FLASH_ATTN_OPERANDS64, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
FLASH_ATTN_WGMMA(80, FLASH_ATTN_D40, FLASH_ATTN_OPERANDS80, "%40", "%41", "%42", "%43", "%44", "%45", "%46")
FLASH_ATTN_WGMMA(96, FLASH_ATTN_D48, FLASH_ATTN_OPERANDS96, "%48", "%49", "%50", "%51", "%52", "%53", "%54")
FLASH_ATTN_WGMMA(112, FLASH_ATTN_D56, FLASH_ATTN_OPERANDS112, "%56", "%57", "%58", "%59", "%60", "%61", "%62")
FLASH_ATTN_WGMMA(128, FLASH_ATTN_D64, FLASH_ATTN_OPERANDS128, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
FLASH_ATTN_WGMMA(144, FLASH_ATTN_D72, FLASH_ATTN_OPERANDS144, "%72", "%73", "%74", "%75", "%76", "%77", "%78")
FLASH_ATTN_WGMMA(160, FLASH_ATTN_D80, FLASH_ATTN_OPERANDS160, "%80", "%81", "%82", "%83", "%84", "%85", "%86")
FLASH_ATTN_WGMMA(176, FLASH_ATTN_D88, FLASH_ATTN_OPERANDS176, "%88", "%89", "%90", "%91", "%92", "%93", "%94")
FLASH_ATTN_WGMMA(192, FLASH_ATTN_D96, FLASH_ATTN_OPERANDS192, "%96", "%97", "%98", "%99", "%100", "%101", "%102")
FLASH_ATTN_WGMMA(208, FLASH_ATTN_D104, FLASH_ATTN_OPERANDS208, "%104", "%105", "%106", "%107", "%108", "%109", "%110")
FLASH_ATTN_WGMMA(224, FLASH_ATTN_D112, FLASH_ATTN_OPERANDS224, "%112", "%113", "%114", "%115", "%116", "%117", "%118")
FLASH_ATTN_WGMMA(240, FLASH_ATTN_D120, FLASH_ATTN_OPERANDS240, "%120", "%121", "%122", "%123", "%124", "%125", "%126")
FLASH_ATTN_WGMMA(256, FLASH_ATTN_D128, FLASH_ATTN_OPERANDS256, "%128", "%129", "%130", "%131", "%132", "%133", "%134")

#undef FLASH_ATTN_D8
#undef FLASH_ATTN_D16
#undef FLASH_ATTN_D24
#undef FLASH_ATTN_D32
#undef FLASH_ATTN_D40
#undef FLASH_ATTN_D48
#undef FLASH_ATTN_D56
#undef FLASH_ATTN_D64
#undef FLASH_ATTN_D72
#undef FLASH_ATTN_D80
#undef FLASH_ATTN_D88
#undef FLASH_ATTN_D96
#undef FLASH_ATTN_D104
#undef FLASH_ATTN_D112
#undef FLASH_ATTN_D120
#undef FLASH_ATTN_D128
#undef FLASH_ATTN_O
#undef FLASH_ATTN_O2
#undef FLASH_ATTN_OPERANDS16
#undef FLASH_ATTN_OPERANDS32
#undef FLASH_ATTN_OPERANDS48
#undef FLASH_ATTN_OPERANDS64
#undef FLASH_ATTN_OPERANDS80
#undef FLASH_ATTN_OPERANDS96
#undef FLASH_ATTN_OPERANDS112
#undef FLASH_ATTN_OPERANDS128
#undef FLASH_ATTN_OPERANDS144
#undef FLASH_ATTN_OPERANDS160
#undef FLASH_ATTN_OPERANDS176
#undef FLASH_ATTN_OPERANDS192
#undef FLASH_ATTN_OPERANDS208
#undef FLASH_ATTN_OPERANDS224
#undef FLASH_ATTN_OPERANDS240
#undef FLASH_ATTN_OPERANDS256
#undef FLASH_ATTN_WGMMA_ASM
#undef FLASH_ATTN_WGMMA

}  // namespace flash_attn::ptx
