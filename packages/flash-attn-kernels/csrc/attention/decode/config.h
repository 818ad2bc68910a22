// Tile shapes of the decode kernel.
#pragma once

#include "../shared_tile.cuh"

namespace flash_attn::decode {

// Every warp has all rows of the item and 16 keys of a tile of keys, which it loads, uses and forgets on its own: no
// barrier in the loop. kStages loads of every warp are on their way or in use.
template <int kHeadDim_, int kWarps_, int kStages_, int kBlocks_>
struct DecodeConfig {
  static constexpr int kHeadDim = kHeadDim_, kHeadDimV = kHeadDim_;
  static constexpr int kRows = 16;
  static constexpr int kWarps = kWarps_, kThreads = 32 * kWarps;
  static constexpr int kWarpKeys = 16, kColumns = kWarpKeys * kWarps;
  static constexpr int kStages = kStages_;
  static constexpr int kBlocksPerMultiprocessor = kBlocks_;
  static constexpr int kLeastTiles = 4;  // of a part: less is not worth a merge
  // Memory is fastest at reading if every multiprocessor runs one block; where a block has no more than so many tiles,
  // what counts is that loads start, and two do better.
  static constexpr int kFewTiles = 16;
  // So do they where pages are smaller, which are looked up more often.
  static constexpr int kLargePage = 64;
  using QueryTile = SharedTile<kRows, kHeadDim>;
  using KeyTile = SharedTile<kWarpKeys, kHeadDim>;
  using ValueTile = SharedTile<kWarpKeys, kHeadDimV>;
  static constexpr int kStageBytes = KeyTile::kBytes + ValueTile::kBytes;
  static constexpr int kLoadBytes = kWarps * kStages * kStageBytes;
  // Afterwards the same memory holds the outputs of all warps.
  static constexpr int kMergeBytes = kWarps * kRows * (kHeadDimV + 2) * 4;
  // Or what is known of all parts of an item, which are at most so many.
  static constexpr int kMostParts = kLoadBytes / (kRows * 4);
  static constexpr int kSharedBytes = QueryTile::kBytes + (kLoadBytes > kMergeBytes ? kLoadBytes : kMergeBytes);
};

// The first one that fits the device's shared memory runs.
template <typename... Configs>
struct DecodeConfigList {};

template <int kHeadDim>
struct DecodeConfigs;

template <>
struct DecodeConfigs<64> {
  using List = DecodeConfigList<DecodeConfig<64, 4, 4, 2>>;
};
template <>
struct DecodeConfigs<128> {
  using List = DecodeConfigList<DecodeConfig<128, 4, 3, 2>, DecodeConfig<128, 4, 2, 1>>;
};
template <>
struct DecodeConfigs<256> {
  using List = DecodeConfigList<DecodeConfig<256, 4, 2, 1>, DecodeConfig<256, 2, 2, 1>>;
};

template <typename Function, typename Config, typename... Others>
auto with_fitting_config(DecodeConfigList<Config, Others...>, int shared_bytes, const Function& function) {
  if constexpr (sizeof...(Others) > 0) {
    if (Config::kSharedBytes > shared_bytes) {
      return with_fitting_config(DecodeConfigList<Others...>{}, shared_bytes, function);
    }
  }
  return function(Config{});
}

// Calls function(config) for the head dims of q and k, and of v.
template <typename Function>
auto with_decode_config(int head_dim, int head_dim_v, int shared_bytes, const Function& function) {
  const int larger = head_dim > head_dim_v ? head_dim : head_dim_v;
  if (larger <= 64) return with_fitting_config(typename DecodeConfigs<64>::List{}, shared_bytes, function);
  if (larger <= 128) return with_fitting_config(typename DecodeConfigs<128>::List{}, shared_bytes, function);
  return with_fitting_config(typename DecodeConfigs<256>::List{}, shared_bytes, function);
}

}  // namespace flash_attn::decode
