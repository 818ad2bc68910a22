// What a block of the backward kernel has in shared memory: tiles, row vectors, barriers.
#pragma once

#include <cstdint>

#include "../../ptx/cp_async.cuh"
#include "backward_config.h"
#include "pipeline.cuh"

namespace flash_attn::sm90 {

constexpr int kNoWork = -1;

// What follows the tiles.
template <typename Config>
struct BackwardStorage {
  float lse[Config::kStages][Config::kRows], delta[Config::kStages][Config::kRows];
  int works[Config::kWorkStages];  // positions, or kNoWork
  PipelineBarriers<Config::kWorkStages> work_barriers;
  PipelineBarriers<1> key_barriers, value_barriers;
  PipelineBarriers<Config::kStages> query_barriers, dout_barriers;
};

// A stage of queries includes their LSE, one of dO includes delta.
template <typename Config>
struct BackwardShared {
  static constexpr int kStages = Config::kStages;
  static constexpr int kTileBytes = 2 * Config::KeyTile::kBytes + 2 * kStages * Config::QueryTile::kBytes +
                                    2 * Config::ScoreTile::kBytes + Config::kConsumers * Config::kQuerySliceBytes;
  static constexpr int kBytes = kTileBytes + sizeof(BackwardStorage<Config>);
  static constexpr int kVectorBytes = Config::kRows * 4;

  uint32_t base;
  BackwardStorage<Config>* storage;
  Pipeline<Config::kWorkStages, ptx::SpinBarrier::kWorkFull, ptx::SpinBarrier::kWorkEmpty> works;
  Pipeline<1, ptx::SpinBarrier::kKeyFull, ptx::SpinBarrier::kKeyEmpty> keys, values;
  Pipeline<kStages, ptx::SpinBarrier::kQueryFull, ptx::SpinBarrier::kQueryEmpty> queries;
  Pipeline<kStages, ptx::SpinBarrier::kValueFull, ptx::SpinBarrier::kValueEmpty> douts;

  __device__ __forceinline__ explicit BackwardShared(uint8_t* shared)
      : base(ptx::shared_address(shared)),
        storage(reinterpret_cast<BackwardStorage<Config>*>(shared + kTileBytes)),
        works{ptx::shared_address(&storage->work_barriers)},
        keys{ptx::shared_address(&storage->key_barriers)},
        values{ptx::shared_address(&storage->value_barriers)},
        queries{ptx::shared_address(&storage->query_barriers)},
        douts{ptx::shared_address(&storage->dout_barriers)} {}

  // One thread; the block then needs a barrier.
  __device__ __forceinline__ void init_barriers() const {
    works.init(5 * Config::kConsumers);  // all computing warps and those that add their gradients read a work
    keys.init(Config::kConsumers);
    values.init(Config::kConsumers);
    queries.init(Config::kConsumers);
    douts.init(Config::kConsumers);
    ptx::fence_mbarrier_init();
  }

  // The next work's position, for a warp; its cursor moves on.
  __device__ __forceinline__ int next_work(Cursor<Config::kWorkStages>& cursor) const {
    works.wait_full(cursor);
    const int position = storage->works[cursor.stage];
    __syncwarp();
    if (threadIdx.x % 32 == 0) works.release(cursor);
    cursor.advance();
    return position;
  }

  __device__ __forceinline__ uint32_t key_tile() const { return base; }
  __device__ __forceinline__ uint32_t value_tile() const { return base + Config::KeyTile::kBytes; }
  __device__ __forceinline__ uint32_t query_tile(int stage) const {
    return base + 2 * Config::KeyTile::kBytes + stage * Config::QueryTile::kBytes;
  }
  __device__ __forceinline__ uint32_t dout_tile(int stage) const { return query_tile(kStages + stage); }
  __device__ __forceinline__ uint32_t ds_tile(int stage) const {
    return query_tile(2 * kStages) + stage * Config::ScoreTile::kBytes;
  }
  __device__ __forceinline__ uint32_t dq_slice(int consumer) const {
    return ds_tile(2) + consumer * Config::kQuerySliceBytes;
  }
  __device__ __forceinline__ uint32_t lse(int stage) const { return ptx::shared_address(storage->lse[stage]); }
  __device__ __forceinline__ uint32_t delta(int stage) const { return ptx::shared_address(storage->delta[stage]); }
};

}  // namespace flash_attn::sm90
