// Stores of four 8x8 matrices of 16-bit elements from tensor-core fragments to shared memory (sm_90).
#pragma once

#include <cstdint>

namespace flash_attn::ptx {

// Lane l gives the address of row l % 8 of matrix l / 8, as it is stored: transposed against its fragment.
__device__ __forceinline__ void stmatrix_x4_transposed(uint32_t address, const uint32_t (&fragment)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(fragment[0]), "r"(fragment[1]), "r"(fragment[2]), "r"(fragment[3])
               : "memory");
}

}  // namespace flash_attn::ptx
