// Tile shapes of the Hopper kernels.
#pragma once

#include "../head_dims.h"
#include "../shared_tile.cuh"

namespace flash_attn::sm90 {

// A block is a warpgroup that loads and kConsumers that compute, each for 64 query rows. Scores, their 16-bit
// probabilities and the output are in registers together: kColumns * 3 / 4 + head_dim_v / 2 of a thread.
// kStages: tiles of keys, and of values, that are on their way or in use. kTakesTurns: consumers issue their products
// one after the other, so that one's products hide another's softmax; worth it unless products take long.
template <int kHeadDim_, int kHeadDimV_, int kConsumers_, int kColumns_, int kQueryStages_, int kStages_,
          bool kTakesTurns_>
struct ForwardConfig {
  static constexpr int kHeadDim = kHeadDim_, kHeadDimV = kHeadDimV_;
  static constexpr int kConsumers = kConsumers_, kConsumerRows = 64;
  static constexpr int kRows = kConsumerRows * kConsumers, kColumns = kColumns_;
  static constexpr bool kTakesTurns = kTakesTurns_;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  // A launch gives all threads the same, a multiple of 8. What the producer releases the consumers share; if they asked
  // for more, the block would wait for ever.
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters =
      (kLaunchRegisters + (kLaunchRegisters - kProducerRegisters) / kConsumers) / 8 * 8;
  static constexpr int kStages = kStages_, kQueryStages = kQueryStages_;
  static constexpr int kWorkStages = 2;
  using QueryTile = SharedTile<kRows, kHeadDim>;
  using KeyTile = SharedTile<kColumns, kHeadDim>;
  using ValueTile = SharedTile<kColumns, kHeadDimV>;
  static constexpr int kTileBytes = kQueryStages * QueryTile::kBytes + kStages * (KeyTile::kBytes + ValueTile::kBytes);
};

// What runs which head dims. Soft-capping the scores takes more registers.
template <typename Dims, bool kSoftcap>
struct ForwardConfigOf;

template <bool kSoftcap>
struct ForwardConfigOf<HeadDims<64, 64>, kSoftcap> {
  using Config = ForwardConfig<64, 64, 3, kSoftcap ? 96 : 128, 2, 3, true>;
};
template <bool kSoftcap>
struct ForwardConfigOf<HeadDims<96, 96>, kSoftcap> {
  using Config = ForwardConfig<96, 96, 3, 96, 1, 3, true>;
};
template <bool kSoftcap>
struct ForwardConfigOf<HeadDims<128, 128>, kSoftcap> {
  using Config = ForwardConfig<128, 128, 2, 128, 2, 2, true>;
};
template <bool kSoftcap>
struct ForwardConfigOf<HeadDims<192, 128>, kSoftcap> {
  using Config = ForwardConfig<192, 128, 2, 128, 1, 2, false>;
};
template <bool kSoftcap>
struct ForwardConfigOf<HeadDims<192, 192>, kSoftcap> {
  using Config = ForwardConfig<192, 192, 2, kSoftcap ? 96 : 112, 1, 2, false>;
};
template <bool kSoftcap>
struct ForwardConfigOf<HeadDims<256, 256>, kSoftcap> {
  using Config = ForwardConfig<256, 256, 2, kSoftcap ? 64 : 80, 1, 2, false>;
};

}  // namespace flash_attn::sm90
