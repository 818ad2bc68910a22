// What a block of the forward kernel has in shared memory: tiles, descriptions of works, barriers.
#pragma once

#include <cstdint>

#include "../../ptx/cp_async.cuh"
#include "config.h"
#include "forward_work.cuh"
#include "pipeline.cuh"

namespace flash_attn::sm90 {

// What follows the tiles.
template <typename Config>
struct ForwardStorage {
  ForwardWork works[Config::kWorkStages];
  TileRange ranges[Config::kWorkStages][Config::kConsumers];  // of keys that the queries of one consumer see
  PipelineBarriers<1> request_barriers;
  PipelineBarriers<Config::kWorkStages> work_barriers;
  PipelineBarriers<Config::kQueryStages> query_barriers;
  PipelineBarriers<Config::kStages> key_barriers, value_barriers;
};

template <typename Config>
struct ForwardShared {
  static constexpr int kBytes = Config::kTileBytes + sizeof(ForwardStorage<Config>);

  uint32_t base;
  ForwardStorage<Config>* storage;
  Pipeline<1, ptx::SpinBarrier::kRequestFull, ptx::SpinBarrier::kRequestEmpty> requests;  // for another work
  Pipeline<Config::kWorkStages, ptx::SpinBarrier::kWorkFull, ptx::SpinBarrier::kWorkEmpty> works;
  Pipeline<Config::kQueryStages, ptx::SpinBarrier::kQueryFull, ptx::SpinBarrier::kQueryEmpty> queries;
  Pipeline<Config::kStages, ptx::SpinBarrier::kKeyFull, ptx::SpinBarrier::kKeyEmpty> keys;
  Pipeline<Config::kStages, ptx::SpinBarrier::kValueFull, ptx::SpinBarrier::kValueEmpty> values;

  __device__ __forceinline__ explicit ForwardShared(uint8_t* shared)
      : base(ptx::shared_address(shared)),
        storage(reinterpret_cast<ForwardStorage<Config>*>(shared + Config::kTileBytes)),
        requests{ptx::shared_address(&storage->request_barriers)},
        works{ptx::shared_address(&storage->work_barriers)},
        queries{ptx::shared_address(&storage->query_barriers)},
        keys{ptx::shared_address(&storage->key_barriers)},
        values{ptx::shared_address(&storage->value_barriers)} {}

  // One thread; the block then needs a barrier.
  __device__ __forceinline__ void init_barriers() const {
    requests.init(1);
    works.init(1 + 4 * Config::kConsumers);  // the loading warp and all computing ones read a work
    queries.init(Config::kConsumers);
    keys.init(Config::kConsumers);
    values.init(Config::kConsumers);
    ptx::fence_mbarrier_init();
  }

  __device__ __forceinline__ uint32_t query_tile(int stage) const { return base + stage * Config::QueryTile::kBytes; }
  __device__ __forceinline__ uint32_t key_tile(int stage) const {
    return query_tile(Config::kQueryStages) + stage * Config::KeyTile::kBytes;
  }
  __device__ __forceinline__ uint32_t value_tile(int stage) const {
    return key_tile(Config::kStages) + stage * Config::ValueTile::kBytes;
  }
};

}  // namespace flash_attn::sm90
