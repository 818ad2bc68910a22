// Tile shapes. A configuration is a type; the first one of a list that fits the device's shared memory runs.
#pragma once

#include "../shared_tile.cuh"

namespace flash_attn::sm80 {

// What kernels are compiled for. Plain ones know windows, packed sequences and sinks; general ones everything. Inputs
// run in the first pair of dimensions that holds theirs, see head_dims.h.
template <int kHeadDim_, int kHeadDimV_, bool kGeneral_>
struct Variant {
  static constexpr int kHeadDim = kHeadDim_, kHeadDimV = kHeadDimV_;
  static constexpr bool kGeneral = kGeneral_;
};

template <typename... Configs>
struct ConfigList {};

// What the host must know of a configuration.
struct TileShape {
  int rows, columns, warps, shared_bytes;
  int head_dim;  // that the kernel computes with
};

// Every warp owns kRows / kWarps query rows. With 32 of them every K and V fragment read from shared memory feeds two
// mma instructions, which keeps shared-memory bandwidth below the tensor cores' rate; the output then takes
// head_dim_v registers of a thread, and the keys per tile fill what is left.
template <int kHeadDim_, int kHeadDimV_, int kRows_, int kColumns_, int kWarps_, int kBlocks_, int kScoreUnroll_,
          bool kGeneral_ = false>
struct ForwardConfig {
  static constexpr bool kGeneral = kGeneral_;
  static constexpr int kHeadDim = kHeadDim_, kHeadDimV = kHeadDimV_;
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kWarps = kWarps_, kThreads = 32 * kWarps;
  static constexpr int kBlocksPerMultiprocessor = kBlocks_;
  // Depth steps of the score product in flight: as many as leave no spills.
  static constexpr int kScoreUnroll = kScoreUnroll_;
  static constexpr int kRowTiles = kRows / (16 * kWarps);
  using QueryTile = SharedTile<kRows, kHeadDim>;
  using OutTile = SharedTile<kRows, kHeadDimV>;
  using KeyTile = SharedTile<kColumns, kHeadDim>;
  using ValueTile = SharedTile<kColumns, kHeadDimV>;
  using BiasTile = SharedTile<kRows, kColumns>;
  static_assert(OutTile::kBytes <= QueryTile::kBytes, "the output leaves through the query tile");
  static constexpr int kSharedBytes =
      QueryTile::kBytes + KeyTile::kBytes + ValueTile::kBytes + (kGeneral ? BiasTile::kBytes + 2 * kColumns : 0);
  static constexpr TileShape kShape{kRows, kColumns, kWarps, kSharedBytes, kHeadDim};
};

template <typename Variant>
struct ForwardConfigs;

template <>
struct ForwardConfigs<Variant<64, 64, false>> {
  using List = ConfigList<ForwardConfig<64, 64, 128, 128, 4, 2, 2>>;
};
template <>
struct ForwardConfigs<Variant<96, 96, false>> {
  using List = ConfigList<ForwardConfig<96, 96, 128, 64, 4, 2, 6>>;
};
template <>
struct ForwardConfigs<Variant<128, 128, false>> {
  using List = ConfigList<ForwardConfig<128, 128, 128, 64, 4, 2, 4>>;
};
template <>
struct ForwardConfigs<Variant<192, 128, false>> {
  using List = ConfigList<ForwardConfig<192, 128, 128, 64, 4, 2, 4>>;
};
template <>
struct ForwardConfigs<Variant<192, 192, false>> {
  using List = ConfigList<ForwardConfig<192, 192, 128, 128, 8, 1, 4>, ForwardConfig<192, 192, 128, 64, 8, 1, 4>>;
};
template <>
struct ForwardConfigs<Variant<256, 256, false>> {
  using List = ConfigList<ForwardConfig<256, 256, 64, 64, 4, 2, 4>>;
};
template <>
struct ForwardConfigs<Variant<64, 64, true>> {
  using List = ConfigList<ForwardConfig<64, 64, 128, 64, 4, 2, 4, true>>;
};
template <>
struct ForwardConfigs<Variant<128, 128, true>> {
  using List = ConfigList<ForwardConfig<128, 128, 64, 64, 4, 2, 4, true>>;
};
template <>
struct ForwardConfigs<Variant<256, 256, true>> {
  using List =
      ConfigList<ForwardConfig<256, 256, 64, 64, 4, 2, 4, true>, ForwardConfig<256, 256, 64, 32, 4, 2, 4, true>>;
};

// A block owns kColumns keys and walks over tiles of kRows queries, in kStages buffers of Q and dO. Each product
// divides its output among the warps as (warps over rows) x (the other warps over columns):
//   scores and their gradient [rows x keys] by kScoreWarps, dK and dV [keys x d] by kKeyWarps, dQ [rows x d] by
//   kQueryWarps. Near-square warp tiles read the fewest operand bytes from shared memory.
template <int kHeadDim_, int kHeadDimV_, int kRows_, int kColumns_, int kWarps_, int kScoreWarps_, int kKeyWarps_,
          int kQueryWarps_, int kStages_, bool kGeneral_ = false>
struct BackwardConfig {
  static constexpr bool kGeneral = kGeneral_;
  static constexpr int kHeadDim = kHeadDim_, kHeadDimV = kHeadDimV_;
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kWarps = kWarps_, kThreads = 32 * kWarps;
  static constexpr int kScoreWarps = kScoreWarps_, kKeyWarps = kKeyWarps_, kQueryWarps = kQueryWarps_;
  static constexpr int kStages = kStages_;
  static constexpr int kBlocksPerMultiprocessor = kWarps <= 4 ? 2 : 1;

  static constexpr int kScoreRowTiles = kRows / (16 * kScoreWarps);
  static constexpr int kScoreColumnTiles = kColumns / (8 * (kWarps / kScoreWarps));
  static constexpr int kKeyRowTiles = kColumns / (16 * kKeyWarps);
  static constexpr int kKeyColumnTiles = kHeadDim / (8 * (kWarps / kKeyWarps));
  static constexpr int kValueColumnTiles = kHeadDimV / (8 * (kWarps / kKeyWarps));
  static constexpr int kQueryRowTiles = kRows / (16 * kQueryWarps);
  static constexpr int kQueryColumnTiles = kHeadDim / (8 * (kWarps / kQueryWarps));

  using KeyTile = SharedTile<kColumns, kHeadDim>;
  using ValueTile = SharedTile<kColumns, kHeadDimV>;
  using QueryTile = SharedTile<kRows, kHeadDim>;
  using OutTile = SharedTile<kRows, kHeadDimV>;
  using ScoreTile = SharedTile<kRows, kColumns>;
  // K, V; P and dS; Q, dO, LSE and delta per stage.
  static constexpr int kSharedBytes = KeyTile::kBytes + ValueTile::kBytes + 2 * ScoreTile::kBytes +
                                      kStages * (QueryTile::kBytes + OutTile::kBytes + 2 * kRows * 4);
  static constexpr TileShape kShape{kRows, kColumns, kWarps, kSharedBytes, kHeadDim};
};

// In deterministic mode every visit of a tile of queries waits for its turn, so that larger tiles pay there, unless
// sequences are short: LargeList.
template <typename Variant>
struct BackwardConfigs;

// At head dim 64 two blocks of 4 warps share a multiprocessor and hide each other's waits; above, the accumulators
// allow one of 8. What follows the first of a list is for devices with less shared memory: 163 KB per block, 99 KB.
template <>
struct BackwardConfigs<Variant<64, 64, false>> {
  using List = ConfigList<BackwardConfig<64, 64, 64, 64, 4, 2, 2, 2, 2>>;
  using LargeList =
      ConfigList<BackwardConfig<64, 64, 128, 128, 8, 4, 4, 4, 2>, BackwardConfig<64, 64, 64, 64, 4, 2, 2, 2, 2>>;
};
template <>
struct BackwardConfigs<Variant<96, 96, false>> {
  using List = ConfigList<BackwardConfig<96, 96, 64, 64, 4, 2, 2, 2, 2>, BackwardConfig<96, 96, 64, 64, 4, 2, 2, 2, 1>>;
  using LargeList =
      ConfigList<BackwardConfig<96, 96, 64, 128, 8, 2, 4, 4, 2>, BackwardConfig<96, 96, 64, 64, 4, 2, 2, 2, 1>>;
};
template <>
struct BackwardConfigs<Variant<128, 128, false>> {
  using List =
      ConfigList<BackwardConfig<128, 128, 64, 128, 8, 2, 4, 2, 2>, BackwardConfig<128, 128, 64, 64, 8, 4, 2, 2, 1>>;
  using LargeList = List;
};
template <>
struct BackwardConfigs<Variant<192, 128, false>> {
  using List =
      ConfigList<BackwardConfig<192, 128, 64, 96, 8, 4, 2, 2, 2>, BackwardConfig<192, 128, 64, 64, 8, 4, 2, 2, 2>,
                 BackwardConfig<192, 128, 32, 64, 8, 2, 2, 2, 1>>;
  using LargeList = List;
};
template <>
struct BackwardConfigs<Variant<192, 192, false>> {
  using List =
      ConfigList<BackwardConfig<192, 192, 64, 96, 8, 4, 2, 2, 2>, BackwardConfig<192, 192, 64, 64, 8, 4, 2, 2, 2>,
                 BackwardConfig<192, 192, 32, 64, 8, 2, 2, 2, 1>>;
  using LargeList = List;
};
template <>
struct BackwardConfigs<Variant<256, 256, false>> {
  using List =
      ConfigList<BackwardConfig<256, 256, 64, 64, 8, 4, 2, 2, 2>, BackwardConfig<256, 256, 64, 64, 8, 4, 2, 2, 1>,
                 BackwardConfig<256, 256, 32, 32, 4, 2, 2, 2, 1>>;
  using LargeList = List;
};
template <>
struct BackwardConfigs<Variant<64, 64, true>> {
  using List = ConfigList<BackwardConfig<64, 64, 64, 64, 4, 2, 2, 2, 2, true>>;
  using LargeList = List;
};
template <>
struct BackwardConfigs<Variant<128, 128, true>> {
  using List = ConfigList<BackwardConfig<128, 128, 64, 64, 8, 4, 2, 2, 1, true>>;
  using LargeList = List;
};
template <>
struct BackwardConfigs<Variant<256, 256, true>> {
  using List = ConfigList<BackwardConfig<256, 256, 32, 64, 8, 2, 2, 2, 1, true>,
                          BackwardConfig<256, 256, 32, 32, 4, 2, 2, 2, 1, true>>;
  using LargeList = List;
};

// Calls `function` with the first configuration that fits `shared_bytes`; the last one serves every device.
template <typename First, typename... Rest, typename Function>
constexpr auto with_config(ConfigList<First, Rest...>, int shared_bytes, const Function& function) {
  if constexpr (sizeof...(Rest) == 0) {
    return function(First{});
  } else {
    return First::kSharedBytes <= shared_bytes ? function(First{})
                                               : with_config(ConfigList<Rest...>{}, shared_bytes, function);
  }
}

template <typename Variant, typename Function>
constexpr auto with_forward_config(int shared_bytes, const Function& function) {
  return with_config(typename ForwardConfigs<Variant>::List{}, shared_bytes, function);
}

template <typename Variant, typename Function>
constexpr auto with_backward_config(bool large_tiles, int shared_bytes, const Function& function) {
  using Configs = BackwardConfigs<Variant>;
  return large_tiles ? with_config(typename Configs::LargeList{}, shared_bytes, function)
                     : with_config(typename Configs::List{}, shared_bytes, function);
}

}  // namespace flash_attn::sm80
