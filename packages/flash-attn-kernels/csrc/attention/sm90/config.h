// Tile shapes of the Hopper kernels.
#pragma once

#include <type_traits>

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

// Full: every query sees every key. Bounded: there is a causal mask or a window. Softcap: the scores are soft-capped,
// which takes more registers.
template <typename Dims>
struct ForwardConfigs;

template <>
struct ForwardConfigs<HeadDims<64, 64>> {
  using Full = ForwardConfig<64, 64, 3, 128, 2, 3, true>;
  using Bounded = Full;
  using Softcap = ForwardConfig<64, 64, 3, 96, 2, 3, true>;
};
template <>
struct ForwardConfigs<HeadDims<96, 96>> {
  using Full = ForwardConfig<96, 96, 2, 128, 2, 2, true>;
  using Bounded = ForwardConfig<96, 96, 3, 96, 2, 2, true>;
  using Softcap = Full;
};
template <>
struct ForwardConfigs<HeadDims<128, 128>> {
  using Full = ForwardConfig<128, 128, 2, 128, 2, 2, true>;
  using Bounded = Full;
  using Softcap = Full;
};
template <>
struct ForwardConfigs<HeadDims<192, 128>> {
  using Full = ForwardConfig<192, 128, 2, 128, 1, 2, false>;
  using Bounded = Full;
  using Softcap = Full;
};
template <>
struct ForwardConfigs<HeadDims<192, 192>> {
  using Full = ForwardConfig<192, 192, 2, 112, 1, 2, false>;
  using Bounded = Full;
  using Softcap = ForwardConfig<192, 192, 2, 96, 1, 2, false>;
};
template <>
struct ForwardConfigs<HeadDims<256, 256>> {
  using Full = ForwardConfig<256, 256, 2, 80, 1, 2, false>;
  using Bounded = Full;
  using Softcap = ForwardConfig<256, 256, 2, 64, 1, 2, false>;
};

// Calls `function` with the configuration that runs.
template <typename Dims, bool kSoftcap, typename Function>
void with_forward_config(bool bounded, const Function& function) {
  using Configs = ForwardConfigs<Dims>;
  if constexpr (kSoftcap) {
    function(typename Configs::Softcap{});
  } else if constexpr (std::is_same_v<typename Configs::Full, typename Configs::Bounded>) {
    function(typename Configs::Full{});
  } else {
    bounded ? function(typename Configs::Bounded{}) : function(typename Configs::Full{});
  }
}

}  // namespace flash_attn::sm90
