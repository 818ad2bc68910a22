// Forward attention on Hopper: blocks stay on their multiprocessors and compute one tile after the other. Of a block's
// warpgroups one decides what to compute and loads it through the copy engine, the others compute.
//
// Each computing warpgroup owns 64 query rows of a tile and goes through the tiles of keys that they see. The scores of
// one tile of keys and the output product of the one before are issued together, so that the softmax runs under the
// latter. Source: Shah et al., "FlashAttention-3", 2024.
#pragma once

#include "../../ptx/tma.cuh"
#include "../../ptx/warpgroup.cuh"
#include "config.h"
#include "forward_compute.cuh"
#include "forward_load.cuh"
#include "forward_params.h"
#include "forward_schedule.cuh"
#include "forward_shared.cuh"

namespace flash_attn::sm90 {

template <typename Element, typename Config, bool kSoftcap>
__global__ void __launch_bounds__(Config::kThreads, 1)
    forward_kernel(const __grid_constant__ ForwardKernelParams params) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  const ForwardShared<Config> shared(shared_bytes);
  if (threadIdx.x == 0) {
    ptx::tma_prefetch_map(params.maps.q);
    ptx::tma_prefetch_map(params.maps.k);
    ptx::tma_prefetch_map(params.maps.v);
    shared.init_barriers();
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / ptx::kWarpgroupThreads, 0);  // known to be uniform
  if (warpgroup == 0) {
    ptx::release_registers<Config::kProducerRegisters>();
    if (threadIdx.x == 0) {
      load(params, shared);
    } else if (threadIdx.x / 32 == 1) {
      schedule(params, shared);
    }
  } else {
    ptx::acquire_registers<Config::kConsumerRegisters>();
    consume<Element, Config, kSoftcap>(params, shared, warpgroup - 1);
  }
}

}  // namespace flash_attn::sm90
