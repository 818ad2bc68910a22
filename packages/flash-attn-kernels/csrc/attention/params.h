// What the host passes to attention kernels. Strides count elements; offsets are 64-bit outside a tile.
#pragma once

#include <cstdint>

namespace flash_attn {

// A (batch, row, head, dim) tensor whose last dimension is contiguous.
struct TensorView {
  void* data;
  int64_t batch_stride;
  int64_t row_stride;
  int64_t head_stride;
};

struct ProblemShape {
  int batch;
  int heads;
  int heads_per_kv_head;
  int seqlen_q;
  int seqlen_k;
};

// Key j is visible to query i iff i + Sk - Sq - left <= j <= i + Sk - Sq + right. Unbounded sides are kUnbounded.
struct Window {
  static constexpr int kUnbounded = 1 << 30;
  int left;
  int right;
};

struct AttentionParams {
  ProblemShape shape;
  Window window;
  float softmax_scale;
  float softmax_scale_log2;  // softmax_scale * log2(e): the kernels exponentiate in base 2
  TensorView q, k, v, out;
};

struct ForwardParams : AttentionParams {
  float* lse;  // (B, H, Sq), natural logarithm
};

struct BackwardParams : AttentionParams {
  TensorView dout, dq, dk, dv;
  const float* lse;   // (B, H, Sq)
  const float* dlse;  // (B, H, Sq), or null
  int query_tiles;    // of one head
  // Scratch, with query rows padded to whole tiles:
  float* lse_log2;        // (B, H, tiles * rows), +inf for rows that see nothing or do not exist
  float* delta;           // (B, H, tiles * rows), rowsum(dO * O) - dLSE
  float* dq_accumulator;  // (B, H, tiles, rows * D) in the order of accumulator fragments, zeroed
  int* dq_turn;           // (B, H, tiles), zeroed: whose turn it is to add; null unless deterministic
};

}  // namespace flash_attn
