// Tile shapes. A configuration is a type; the launchers pick one by head dim and by the device's shared memory.
#pragma once

namespace flash_attn::sm80 {

// 4 warps of 32 query rows each: every K and V fragment read from shared memory feeds two mma instructions, which
// keeps shared-memory bandwidth below the tensor cores' rate. 64 (d128) or 112 (d64) keys fill the registers that
// the 128-row output leaves free at two blocks per multiprocessor; both fit the 99 KB of the smallest devices.
template <int kHeadDim_>
struct ForwardConfig {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = 128;
  static constexpr int kColumns = kHeadDim <= 64 ? 112 : 64;
  // Depth steps of the score product in flight: as many as leave no spills.
  static constexpr int kScoreUnroll = kHeadDim <= 64 ? 2 : 4;
  static constexpr int kRowTiles = kRows / (16 * kWarps);
  static constexpr int kBlocksPerMultiprocessor = 2;
  static constexpr int kSharedBytes = (kRows + 2 * kColumns) * kHeadDim * 2;
};

// A block owns kColumns keys and walks over tiles of kRows queries, in kStages buffers of Q and dO. Each product
// divides its output among the warps as (warps over rows) x (the other warps over columns):
//   scores and their gradient [rows x keys] by kScoreWarps, dK and dV [keys x d] by kKeyWarps, dQ [rows x d] by
//   kQueryWarps. Near-square warp tiles read the fewest operand bytes from shared memory.
template <int kHeadDim_, int kRows_, int kColumns_, int kWarps_, int kScoreWarps_, int kKeyWarps_, int kQueryWarps_,
          int kStages_>
struct BackwardConfig {
  static constexpr int kHeadDim = kHeadDim_, kRows = kRows_, kColumns = kColumns_;
  static constexpr int kWarps = kWarps_, kThreads = 32 * kWarps;
  static constexpr int kScoreWarps = kScoreWarps_, kKeyWarps = kKeyWarps_, kQueryWarps = kQueryWarps_;
  static constexpr int kStages = kStages_;
  static constexpr int kBlocksPerMultiprocessor = kWarps <= 4 ? 2 : 1;

  static constexpr int kScoreRowTiles = kRows / (16 * kScoreWarps);
  static constexpr int kScoreColumnTiles = kColumns / (8 * (kWarps / kScoreWarps));
  static constexpr int kKeyRowTiles = kColumns / (16 * kKeyWarps);
  static constexpr int kKeyColumnTiles = kHeadDim / (8 * (kWarps / kKeyWarps));
  static constexpr int kQueryRowTiles = kRows / (16 * kQueryWarps);
  static constexpr int kQueryColumnTiles = kHeadDim / (8 * (kWarps / kQueryWarps));

  // K, V; Q and dO per stage; P and dS; LSE and delta per stage.
  static constexpr int kSharedBytes =
      2 * (2 * kColumns * kHeadDim + kStages * 2 * kRows * kHeadDim + 2 * kRows * kColumns) + kStages * 2 * kRows * 4;
};

// "Large" needs the shared memory of A100 and H100 (163 KB and more per block); "small" fits 99 KB. At head dim 64 two
// blocks of 4 warps share a multiprocessor and hide each other's waits; at 128 the accumulators allow one of 8.
template <int kHeadDim>
struct BackwardConfigs;

template <>
struct BackwardConfigs<64> {
  using Large = BackwardConfig<64, 64, 64, 4, 2, 2, 2, 2>;
  using Small = Large;
};

template <>
struct BackwardConfigs<128> {
  using Large = BackwardConfig<128, 64, 128, 8, 2, 4, 2, 2>;
  using Small = BackwardConfig<128, 64, 64, 8, 4, 2, 2, 1>;
};

// Query rows per tile of the backward on a device that grants a block `shared_bytes`; scratch is padded to it.
template <int kHeadDim>
constexpr int backward_rows(int shared_bytes) {
  using Configs = BackwardConfigs<kHeadDim>;
  return shared_bytes >= Configs::Large::kSharedBytes ? Configs::Large::kRows : Configs::Small::kRows;
}

}  // namespace flash_attn::sm80
