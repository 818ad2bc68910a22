// Tile shapes of the Hopper backward.
#pragma once

#include "../head_dims.h"
#include "../shared_tile.cuh"

namespace flash_attn::sm90 {

// A block is a warpgroup that moves data and two that compute, each for 64 of the 128 keys of a tile. Of a tile of
// kRows queries a thread of those has the scores and their gradient in kRows registers, and for all tiles dK and dV in
// kHeadDim. The product dQ is divided by its rows, or, if it has only 64, by its columns.
template <int kHeadDim_, int kRows_>
struct BackwardConfig {
  static constexpr int kHeadDim = kHeadDim_, kRows = kRows_, kColumns = 128;
  static constexpr int kConsumers = 2, kConsumerColumns = 64, kStages = 2, kWorkStages = 2;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  // A launch gives all threads 168; what the first warpgroup releases the others share. It spills at 24.
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  using KeyTile = SharedTile<kColumns, kHeadDim>;
  using QueryTile = SharedTile<kRows, kHeadDim>;
  using ScoreTile = SharedTile<kRows, kColumns>;

  static constexpr bool kDividesRows = kRows == 128;
  static constexpr int kQueryFragments = kRows * kHeadDim / (4 * 128 * kConsumers);  // of dQ that a thread has
  static constexpr int kQuerySliceBytes = kRows * kHeadDim * 4 / kConsumers;         // of dQ that a consumer has
  static_assert(kRows == 64 * (kDividesRows ? 2 : 1) && kHeadDim == 64 * (kDividesRows ? 1 : 2));

  // Of the kernels that go through the rows before and after, as sm80 has them.
  struct RowKernels {
    static constexpr int kRows = kRows_, kHeadDim = kHeadDim_, kHeadDimV = kHeadDim_, kThreads = 256, kWarps = 8;
    static constexpr bool kGeneral = false;
  };
};

template <typename Dims>
struct BackwardConfigOf;
template <>
struct BackwardConfigOf<HeadDims<64, 64>> {
  using Config = BackwardConfig<64, 128>;
};
template <>
struct BackwardConfigOf<HeadDims<128, 128>> {
  using Config = BackwardConfig<128, 64>;
};

}  // namespace flash_attn::sm90
