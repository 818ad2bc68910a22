// Copies of tiles between global and shared memory.
//
// Eight neighbouring threads move the 128 bytes that one row has in one panel. Rows that do not exist and columns past
// the head dim become zeros in shared memory and are not written to global memory.
#pragma once

#include <cstdint>

#include "../ptx/cp_async.cuh"
#include "../ptx/shared_memory.cuh"
#include "params.h"
#include "sequence.cuh"
#include "shared_tile.cuh"

namespace flash_attn {

// Rows [0, count) of one sequence and head, which start on 16-byte boundaries.
struct AlignedRows {
  const uint16_t* data;
  int64_t stride;
  int count;
  int head_dim;

  __device__ __forceinline__ AlignedRows(const uint16_t* data, int64_t stride, int count, int head_dim)
      : data(data), stride(stride), count(count), head_dim(head_dim) {}
  __device__ __forceinline__ AlignedRows(const AttentionParams&, const TensorView& view, int index, int first_row,
                                         int count, int head, int head_dim)
      : data(matrix_of(view, index, first_row, head)), stride(view.row_stride), count(count), head_dim(head_dim) {}
};

// Rows of any alignment, perhaps in pages, perhaps with some hidden by a key-padding mask.
struct GeneralRows {
  const uint16_t* data;
  int64_t stride;
  int count;
  int head_dim;
  bool aligned;
  const uint8_t* padding = nullptr;  // of the sequence; hidden rows are not read
  int64_t padding_stride = 0;
  int padding_count = 0;
  const int* pages = nullptr;  // of the sequence
  int page_size = 1, page_count = 0;
  int64_t page_stride = 0;

  __device__ __forceinline__ GeneralRows(const AttentionParams& params, const TensorView& view, int index,
                                         int first_row, int count, int head, int head_dim)
      : data(matrix_of(view, index, first_row, head)),
        stride(view.row_stride),
        count(count),
        head_dim(head_dim),
        aligned(params.modifiers.aligned_rows) {}

  __device__ __forceinline__ const uint16_t* row(int row) const {
    if (row >= count) return nullptr;
    if (padding != nullptr && (row >= padding_count || padding[row * padding_stride] == 0)) return nullptr;
    if (pages == nullptr) return data + row * stride;
    const int page = pages[row / page_size];
    return page >= 0 && page < page_count ? data + page * page_stride + row % page_size * stride : nullptr;
  }
};

// The rows of keys or of values.
__device__ __forceinline__ AlignedRows key_rows(const AlignedRows& rows, const AttentionParams&, int, int64_t) {
  return rows;
}

__device__ __forceinline__ GeneralRows key_rows(GeneralRows rows, const AttentionParams& params, int index,
                                                int64_t page_stride) {
  const ModifierParams& modifiers = params.modifiers;
  if (modifiers.key_padding.present) {
    rows.padding = static_cast<const uint8_t*>(modifiers.key_padding.data) + index * modifiers.key_padding.batch_stride;
    rows.padding_stride = modifiers.key_padding.column_stride;
    rows.padding_count = modifiers.key_padding.columns;
  }
  if (modifiers.pages.table != nullptr) {
    const PageLayout& pages = modifiers.pages;
    int entry = index;
    if (pages.entries != nullptr) entry = index < params.shape.batch ? pages.entries[index] : -1;
    if (entry < 0 || entry >= pages.table_entries) rows.count = 0;
    rows.pages = pages.table + entry * pages.table_stride;
    rows.page_size = pages.page_size, rows.page_count = pages.count;
    rows.page_stride = page_stride;
  }
  return rows;
}

struct IgnoreRow {
  __device__ __forceinline__ void operator()(int, bool) const {}
};

// Starts copying rows [first_row, first_row + kRows).
template <int kThreads, typename Tile, typename OnRow = IgnoreRow>
__device__ __forceinline__ void load_tile_async(const Tile& tile, const AlignedRows& rows, int first_row, int thread,
                                                const OnRow& = {}) {
  constexpr int kRowsPerPass = kThreads / kPanelChunks;
  static_assert(Tile::kRows % kRowsPerPass == 0 && kRowsPerPass % 8 == 0);
  const int chunk = thread % kPanelChunks, row = thread / kPanelChunks;
  const uint32_t target = tile.chunk_address(row, chunk);
  const int valid_columns = rows.head_dim - chunk * kChunkElements;
  const uint16_t* source = rows.data + (first_row + row) * rows.stride + chunk * kChunkElements;
  int valid_rows[Tile::kPanels];
#pragma unroll
  for (int panel = 0; panel < Tile::kPanels; ++panel) {
    valid_rows[panel] = panel * kPanelElements < valid_columns ? rows.count - first_row - row : 0;
  }
  int64_t step = kRowsPerPass * rows.stride;
  asm volatile("" : "+l"(step));  // or the offsets of all passes get hoisted into registers that do not exist
#pragma unroll
  for (int pass = 0; pass < Tile::kRows / kRowsPerPass; ++pass) {
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      ptx::cp_async_16(target + panel * Tile::kPanelBytes + pass * kRowsPerPass * kRowBytes,
                       source + panel * kPanelElements, pass * kRowsPerPass < valid_rows[panel]);
    }
    source += step;
  }
}

// The same for rows of any alignment. Without 16-byte alignment the copy is over when the call returns. If rows are in
// pages, on_row(row of the tile, whether it exists) is called once for each.
template <int kThreads, typename Tile, typename OnRow = IgnoreRow>
__device__ __forceinline__ void load_tile_async(const Tile& tile, const GeneralRows& rows, int first_row, int thread,
                                                const OnRow& on_row = {}) {
  if (rows.aligned && rows.padding == nullptr && rows.pages == nullptr) {
    load_tile_async<kThreads>(tile, AlignedRows(rows.data, rows.stride, rows.count, rows.head_dim), first_row, thread);
    return;
  }
  constexpr int kRowsPerPass = kThreads / kPanelChunks, kPasses = Tile::kRows / kRowsPerPass;
  const int chunk = thread % kPanelChunks;
  if (rows.aligned) {
    const uint16_t* sources[kPasses];  // found together, so that page tables are waited for once
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      sources[pass] = rows.row(first_row + thread / kPanelChunks + pass * kRowsPerPass);
    }
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int row = thread / kPanelChunks + pass * kRowsPerPass;
      if (chunk == 0 && rows.pages != nullptr) on_row(row, sources[pass] != nullptr);
#pragma unroll
      for (int panel = 0; panel < Tile::kPanels; ++panel) {
        const int column = panel * kPanelElements + chunk * kChunkElements;
        const bool valid = sources[pass] != nullptr && column < rows.head_dim;
        ptx::cp_async_16(tile.chunk_address(row, panel * kPanelChunks + chunk),
                         valid ? sources[pass] + column : rows.data, valid);
      }
    }
    return;
  }
#pragma unroll 1
  for (int row = thread / kPanelChunks; row < Tile::kRows; row += kRowsPerPass) {
    const uint16_t* source = rows.row(first_row + row);
    if (chunk == 0 && rows.pages != nullptr) on_row(row, source != nullptr);
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      const int column = panel * kPanelElements + chunk * kChunkElements;
      const int valid = source == nullptr ? 0 : rows.head_dim - column;
      uint32_t words[kChunkElements / 2];
#pragma unroll
      for (int i = 0; i < kChunkElements / 2; ++i) {
        const uint32_t low = 2 * i < valid ? source[column + 2 * i] : 0;
        const uint32_t high = 2 * i + 1 < valid ? source[column + 2 * i + 1] : 0;
        words[i] = low | high << 16;
      }
      ptx::store_shared_16(tile.chunk_address(row, panel * kPanelChunks + chunk), words);
    }
  }
}

// Copies rows [tile_row, tile_row + kCopyRows) of a tile to rows first_row + tile_row + ... of a matrix with
// `row_count` rows of `head_dim` elements. kAligned: rows of the matrix start on 16-byte boundaries.
template <int kThreads, int kCopyRows, bool kAligned, typename Tile>
__device__ __forceinline__ void store_tile(const Tile& tile, uint16_t* matrix, int64_t row_stride, int tile_row,
                                           int first_row, int row_count, int head_dim, int thread) {
  constexpr int kRowsPerPass = kThreads / kPanelChunks;
  static_assert(kCopyRows % kRowsPerPass == 0);
  const int chunk = thread % kPanelChunks;
#pragma unroll
  for (int pass = 0; pass < kCopyRows / kRowsPerPass; ++pass) {
    const int row = tile_row + thread / kPanelChunks + pass * kRowsPerPass;
    uint16_t* target = matrix + (first_row + row) * row_stride;
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      const int column = panel * kPanelElements + chunk * kChunkElements;
      const uint4 value = ptx::load_shared_16(tile.chunk_address(row, panel * kPanelChunks + chunk));
      if (first_row + row >= row_count || column >= head_dim) continue;
      if constexpr (kAligned) {
        *reinterpret_cast<uint4*>(target + column) = value;
      } else {
        const uint32_t words[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
        for (int i = 0; i < kChunkElements; ++i) {
          if (column + i < head_dim) target[column + i] = static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
        }
      }
    }
  }
}

}  // namespace flash_attn
