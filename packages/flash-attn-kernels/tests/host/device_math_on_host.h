// Arithmetic of device code for the CPU: what kernels write in PTX, or leave to intrinsics.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>
#include <cmath>
#include <cstdint>

// The instruction stays unused under another name.
#define exp2 exp2_in_ptx
#include "ptx/convert.cuh"
#undef exp2

namespace flash_attn::ptx {
inline float exp2(float x) { return std::exp2(x); }

template <>
inline uint32_t pack<__half>(float low, float high) {
  const auto bits = [](float x) { return uint32_t{std::bit_cast<uint16_t>(__float2half(x))}; };
  return bits(low) | bits(high) << 16;
}
}  // namespace flash_attn::ptx

#define __log2f log2f  // the C library declares the former, and has only the latter
inline float __fdividef(float x, float y) { return x / y; }

template <typename Value>
Value __ldcg(const Value* pointer) {
  return *pointer;
}
