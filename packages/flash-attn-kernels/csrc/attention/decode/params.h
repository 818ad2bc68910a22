// What the host passes to the decode kernel: attention of few queries to many cached keys.
#pragma once

#include <cstdint>

#include "../params.h"

namespace flash_attn::decode {

// Keys and values of sequence b: rows of cache entry `entries[b]` (b without), which are the rows of one matrix or,
// with a page table, of pages: key t is row t % page_size of page table[entry * table_stride + t / page_size].
struct CacheLayout {
  TensorView k, v;     // (page or entry, row, head, dim); batch_stride leads from one page or entry to the next
  const int* lengths;  // (sequences): keys of each
  const int* leftpad;  // (sequences): so many keys at the beginning are none; null is 0
  const int* entries;
  const int* page_table;
  int64_t page_table_stride;
  int page_size;
  int capacity;  // rows that an entry has room for
};

struct DecodeParams {
  ProblemShape shape;
  RowLayout queries;
  CacheLayout cache;
  TensorView q, out;
  Window window;
  float softmax_scale_log2;
  float softcap;               // 0 is off
  const float* alibi_slopes;   // null if absent
  int64_t alibi_batch_stride;  // of (batch or 1, heads)
  const float* learnable_sink;
  float* lse;
  int64_t lse_batch_stride, lse_head_stride;

  // Into how many parts the keys of a sequence are cut; 0: so that all blocks have equally much to do, or, with
  // tiles_per_part, at multiples of so many tiles, whatever else is in the batch.
  int num_splits, tiles_per_part;
  int blocks_at_once;   // that the device runs
  float* out_partial;   // (slots, rows, head dim of v), normalised
  float* lse_partial;   // (slots, rows), base 2
  int* finished_parts;  // (items), zeroed
};

}  // namespace flash_attn::decode
