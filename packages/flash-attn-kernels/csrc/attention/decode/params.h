// What the host passes to the kernels of inference attention: of few queries to many cached keys.
#pragma once

#include <cstdint>

#include "../params.h"

namespace flash_attn::decode {

// Keys and values of sequence b: rows of cache entry `entries[b]` (b without), which are the rows of one matrix or,
// with a page table, of pages: key t is row t % page_size of page table[entry * table_stride + t / page_size].
struct CacheLayout {
  TensorView k, v;     // (page or entry, row, head, dim); batch_stride leads from one page or entry to the next
  const int* lengths;  // (sequences): keys of each, without those that are appended in the same call
  const int* leftpad;  // (sequences): so many keys at the beginning are none; null is 0
  const int* entries;
  const int* page_table;
  int64_t page_table_stride;
  int page_size;
  int capacity;      // rows that an entry has room for
  int pages;         // that there are, or entries without a page table
  int page_entries;  // rows of the page table
};

// Where a key of an entry lies. Entries and pages that do not exist, as bad tables may name, have no place: what is
// there is not written and not visible.
struct CachePlace {
  int page;  // or entry; -1 is none
  int slot;

  __host__ __device__ __forceinline__ CachePlace(const CacheLayout& cache, int entry, int key)
      : page(entry), slot(key) {
    if (cache.page_table != nullptr) {
      const int number = key / cache.page_size;
      slot = key - number * cache.page_size;
      page = entry >= 0 && entry < cache.page_entries ? cache.page_table[entry * cache.page_table_stride + number] : -1;
    }
    if (page >= cache.pages) page = -1;
    if (page < 0) page = -1;
  }
};

struct DecodeParams {
  ProblemShape shape;
  RowLayout queries;
  RowLayout added;  // rows of keys that the cache has got in the same call
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
  int ranges;           // of equal size, one for each block of a key-value head
  int items;            // that there is room for
  float* out_partial;   // (slots, rows, head dim of v), normalised
  float* lse_partial;   // (slots, rows), base 2
  int* finished_parts;  // (items), zeroed
};

enum class NumberType : int { kHalf, kBFloat16, kFloat };

// New rows of keys and values for the cache, and queries that are rotated on the way.
struct AppendParams {
  int batch;
  RowLayout added, queries;  // rows of k and v, and of q
  int kv_heads, heads;       // heads is 0 without queries
  int head_dim, head_dim_v;
  TensorView k, v, q, q_out;
  CacheLayout cache;
  // On the way, for the next kernel; null if it does not want that:
  int* zeroed;  // integers that are set to 0
  int zeroed_count;
  int* lengths_after;  // (sequences): keys of each, with the new ones
  const void* cos;     // (rows, rotary_dim / 2), null without rotation
  const void* sin;
  NumberType rotary_type;
  int rotary_rows, rotary_dim;
  bool interleaved;     // element 2 i turns with 2 i + 1, not i with i + rotary_dim / 2
  bool q_per_position;  // query i is turned as the key at its position, not all as the first
};

}  // namespace flash_attn::decode
