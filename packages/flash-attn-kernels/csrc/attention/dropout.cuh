// Dropout decisions from the Philox counter generator (Salmon et al., SC 2011), seven rounds.
//
// Keyed on what an element is, so that every tile size, path and direction sees the same mask: the four words of
// Philox(key = seed, counter = (column / 2, row / 16 * 8 + row % 8, batch * heads + head, offset)) belong to the rows
// {r, r + 8} and the columns {c, c + 1} of one accumulator fragment. philox.py is the same in Python.
#pragma once

#include <cstdint>

#include "params.h"

namespace flash_attn {

struct Dropout {
  uint32_t key[2];
  uint32_t offset;
  uint32_t flat_head;
  uint32_t threshold;

  __device__ __forceinline__ Dropout(const ModifierParams& params, int flat_head_) : flat_head(flat_head_) {
    const int64_t seed = params.seed_and_offset[0];
    key[0] = static_cast<uint32_t>(seed), key[1] = static_cast<uint32_t>(seed >> 32);
    offset = static_cast<uint32_t>(params.seed_and_offset[1]);
    threshold = params.drop_threshold;
  }

  // Whether (row, column), (row, column + 1), (row + 8, column), (row + 8, column + 1) survive; row % 16 < 8 and
  // column is even.
  __device__ __forceinline__ void keep(bool (&kept)[4], int row, int column) const {
    uint32_t c0 = column / 2, c1 = row / 16 * 8 + row % 8, c2 = flat_head, c3 = offset;
    uint32_t k0 = key[0], k1 = key[1];
#pragma unroll
    for (int round = 0; round < 7; ++round) {
      const uint64_t first = static_cast<uint64_t>(0xD2511F53u) * c0;
      const uint64_t second = static_cast<uint64_t>(0xCD9E8D57u) * c2;
      c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
      c1 = static_cast<uint32_t>(second);
      c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
      c3 = static_cast<uint32_t>(first);
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    kept[0] = c0 >= threshold, kept[1] = c1 >= threshold, kept[2] = c2 >= threshold, kept[3] = c3 >= threshold;
  }
};

}  // namespace flash_attn
