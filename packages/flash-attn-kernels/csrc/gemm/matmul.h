// One matrix product with an epilogue, by cuBLASLt. Matrices are row-major here, as torch has them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <functional>

#include "cublaslt_abi.h"

namespace flash_attn::gemm {

struct Matrix {
  void* data;
  int64_t rows, columns;
  int64_t leading;  // elements from one row to the next or, if transposed, from one column to the next
  bool transposed;  // stored as the transpose
};

struct Product {
  Matrix a, b, out;  // out = epilogue(a b), and is not transposed
  int type;          // of all three and of the bias: kLtHalf or kLtBFloat16
  LtEpilogue epilogue;
  void* bias;           // read or, by the epilogues of gradients, written
  void* aux;            // pre-activation or bit mask: written forward, read backward
  int64_t aux_leading;  // in elements, of the bit mask in bits
  int device;
  int64_t max_workspace_bytes;
};

constexpr int kCandidates = 8;  // algorithms asked for at most

// As kTuned every candidate is timed once for each problem, which waits for the device, and the fastest is kept. While
// the stream is captured into a graph there is no timing, and an untimed problem takes candidate 0.
constexpr int64_t kTuned = -1;

// How many algorithms cuBLASLt proposes, best guess first.
int candidate_count(const Product& product);

// `workspace(bytes)` gives memory that lives until the work on the stream is enqueued, and after that in stream order.
void run(const Product& product, int64_t algorithm, cudaStream_t stream,
         const std::function<void*(int64_t bytes)>& workspace);

}  // namespace flash_attn::gemm
