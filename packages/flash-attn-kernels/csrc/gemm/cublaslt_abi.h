// The part of cuBLASLt's binary interface that we call, as NVIDIA documents it, the same in CUDA 12 and 13. It stands
// in for their header, so that building needs none and the library has no link to theirs. tests/host compares the two.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace flash_attn::gemm {

using LtHandle = void*;
using LtDescription = void*;
using LtLayout = void*;
using LtPreference = void*;
using LtStatus = int;

struct LtAlgorithm {
  uint64_t opaque[8];
};

struct LtCandidate {
  LtAlgorithm algorithm;
  size_t workspace_bytes;
  LtStatus status;
  float waves;
  int reserved[4];
};

constexpr LtStatus kLtSuccess = 0;
constexpr int kLtComputeFloat = 68;
constexpr int kLtFloat = 0, kLtHalf = 2, kLtBFloat16 = 14;  // cudaDataType_t

enum LtOperation : int32_t { kLtAsIs = 0, kLtTransposed = 1 };

enum LtDescriptionAttribute : int {
  kLtTransposeA = 3,
  kLtTransposeB = 4,
  kLtEpilogue = 7,
  kLtBiasPointer = 8,
  kLtAuxPointer = 11,
  kLtAuxLeading = 12,
};

enum LtPreferenceAttribute : int {
  kLtMaxWorkspaceBytes = 1,
  kLtAlignmentA = 5,
  kLtAlignmentB = 6,
  kLtAlignmentC = 7,
  kLtAlignmentD = 8,
};

// What is done to a result D before it is stored. Matrices are column-major here: a bias has one value for each row.
enum LtEpilogue : uint32_t {
  kLtDefault = 1,
  kLtBias = 4,
  kLtReluBias = 2 | 4,
  kLtReluAuxBias = 2 | 4 | 128,  // also stores one bit an element: whether it was above 0
  kLtGeluBias = 32 | 4,
  kLtGeluAuxBias = 32 | 4 | 128,  // also stores what the GELU was applied to
  kLtReluGradient = 8 | 128,
  kLtReluBiasGradient = 8 | 128 | 16,  // also stores the sums of D over its columns
  kLtGeluGradient = 64 | 128,
  kLtGeluBiasGradient = 64 | 128 | 16,
  kLtBiasGradientB = 512,  // also stores the sums of the second factor over k
};

struct LtFunctions {
  LtStatus (*create)(LtHandle* handle);
  size_t (*version)();
  const char* (*status_string)(LtStatus status);
  LtStatus (*description_create)(LtDescription* description, int compute_type, int scale_type);
  LtStatus (*description_destroy)(LtDescription description);
  LtStatus (*description_set)(LtDescription description, int attribute, const void* value, size_t bytes);
  LtStatus (*layout_create)(LtLayout* layout, int type, uint64_t rows, uint64_t columns, int64_t leading);
  LtStatus (*preference_create)(LtPreference* preference);
  LtStatus (*preference_destroy)(LtPreference preference);
  LtStatus (*preference_set)(LtPreference preference, int attribute, const void* value, size_t bytes);
  LtStatus (*candidates)(LtHandle handle, LtDescription description, LtLayout a, LtLayout b, LtLayout c, LtLayout d,
                         LtPreference preference, int wanted, LtCandidate* found, int* found_count);
  LtStatus (*matmul)(LtHandle handle, LtDescription description, const void* alpha, const void* a, LtLayout a_layout,
                     const void* b, LtLayout b_layout, const void* beta, const void* c, LtLayout c_layout, void* d,
                     LtLayout d_layout, const LtAlgorithm* algorithm, void* workspace, size_t workspace_bytes,
                     cudaStream_t stream);
};

}  // namespace flash_attn::gemm
