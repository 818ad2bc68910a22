// What the host passes to attention kernels. Strides count elements; offsets are 64-bit outside a tile.
#pragma once

#include <cstdint>

namespace flash_attn {

// A (batch, row, head, dim) tensor whose last dimension is contiguous. Packed tensors (row, head, dim) have batch
// stride 0, and so do pages, whose rows a page table finds.
struct TensorView {
  void* data;
  int64_t batch_stride;
  int64_t row_stride;
  int64_t head_stride;
};

struct ProblemShape {
  int batch;  // sequences
  int heads;
  int heads_per_kv_head;
  int head_dim;    // of q and k; the kernels compute with the next larger dimension they are compiled for
  int head_dim_v;  // of v
};

// How the rows of queries, or of keys, divide into sequences. Dense: `rows` of each. Packed: sequence b has the rows
// [cu_seqlens[b], cu_seqlens[b + 1]) of `rows`. Only the first seqused[b] of a sequence take part, if given, and never
// more than `capacity`, which is what a page table has room for.
struct RowLayout {
  const int* cu_seqlens;
  const int* seqused;
  int rows;
  int capacity;
};

// Keys and values in pages: key t of sequence b is row t % page_size of page table[e * table_stride + t / page_size],
// where e is entries[b], or b without entries. Keys of entries and pages that do not exist are hidden.
struct PageLayout {
  const int* table;  // null without pages
  int64_t table_stride;
  const int* entries;
  int table_entries;
  int page_size;
  int count;  // of pages
  int64_t k_page_stride, v_page_stride;
};

// Key j is visible to query i iff i + shift - left <= j <= i + shift + right, where shift is Sk - Sq, or 0 if the
// window is aligned at the top left. Unbounded sides are kUnbounded.
struct Window {
  static constexpr int kUnbounded = 1 << 30;
  int left;
  int right;
  bool top_left;
};

// The longest sequence: a position, a tile and an unbounded side then add up in 32 bits.
constexpr int kMaxSeqlen = Window::kUnbounded - 256;

enum class BiasType : int { kHalf, kBFloat16, kFloat };

// Broadcastable to (batch, head, row, column): stride 0 where it is. Positions past an extent have no entry.
struct ScoreTensor {
  bool present;
  void* data;
  int64_t batch_stride, head_stride, row_stride, column_stride;
  int rows, columns;  // extents; Window::kUnbounded where broadcast
};

// What only the general kernels can do.
struct ModifierParams {
  float softcap;                   // 0 is off
  const float* alibi_slopes;       // null if absent
  int64_t alibi_batch_stride;      // of (batch or 1, heads)
  ScoreTensor bias;                // added
  BiasType bias_type;              // element type of bias
  bool bias_is_staged;             // a 16-bit bias that goes through shared memory in 16-byte chunks
  ScoreTensor mask;                // bytes, 0 hides
  ScoreTensor key_padding;         // bytes, 0 hides the key and makes its memory untouched
  const int64_t* seed_and_offset;  // of the dropout; null without
  uint32_t drop_threshold;         // an element is dropped iff its random word is below
  float keep_scale;                // 1 / (1 - p)
  bool aligned_rows;               // rows of all tensors can be moved in 16-byte chunks
  PageLayout pages;
};

struct AttentionParams {
  ProblemShape shape;
  RowLayout queries, keys;
  Window window;
  float softmax_scale;
  float softmax_scale_log2;  // softmax_scale * log2(e): the kernels exponentiate in base 2
  TensorView q, k, v, out;
  int64_t lse_batch_stride, lse_head_stride;  // of lse and dlse; queries follow each other
  const float* learnable_sink;                // (heads), null without
  ModifierParams modifiers;
};

struct ForwardParams : AttentionParams {
  float* lse;       // natural logarithm
  int query_slots;  // tiles of queries of one head, see sequence.cuh
};

struct BackwardParams : AttentionParams {
  TensorView dout, dq, dk, dv;
  const float* lse;
  const float* dlse;           // null without
  int query_slots, key_slots;  // tiles of one head
  bool large_tiles;            // whether deterministic mode wants its own tile shapes
  int group_splits;            // blocks that share the query heads of one key-value head
  int head_interleave;         // how many heads take turns in starting a block, see backward_work.cuh
  // Scratch, with query rows padded to whole tiles:
  float* lse_log2;        // (heads, query slots, rows), +inf for rows that see nothing or do not exist
  float* delta;           // (heads, query slots, rows), rowsum(dO * O) - dLSE
  float* dq_accumulator;  // (heads, query slots, rows * D) in the order of accumulator fragments, zeroed
  int* dq_turn;           // (heads, query slots), zeroed: whose turn it is to add; null unless deterministic
  float* dk_partial;      // (group splits, key rows, kv heads, D), likewise dv_partial; null if group_splits is 1
  float* dv_partial;
  // Gradients of the modifiers; null where not asked for:
  float* sink_partial;   // (heads, query slots)
  float* slope_partial;  // (heads, key slots, warps), zeroed
  ScoreTensor dbias;     // fp32 and added to, or of the bias's type and stored; zeroed
  bool dbias_is_stored;  // no two scores share an entry
};

}  // namespace flash_attn
