// Backward attention on Hopper: blocks stay on their multiprocessors and take one (key-value head, tile of keys) after
// the other, walking over the query tiles that see it.
//
//   P = exp(S - LSE), dV += P^T dO, dP = dO V^T, dS = P (dP - delta), dQ += dS K, dK += dS^T Q
//
// Scores are computed transposed, so that P and dS are operands of dV and dK as they lie in registers; only dS goes
// through shared memory, for dQ, which the copy engine adds to an fp32 accumulator. Source: Shah et al.,
// "FlashAttention-3", 2024.
#pragma once

#include "backward_compute.cuh"
#include "backward_move.cuh"

namespace flash_attn::sm90 {

template <typename Element, typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    backward_kernel(const __grid_constant__ BackwardKernelParams params) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  const BackwardShared<Config> shared(shared_bytes);
  if (threadIdx.x == 0) {
    ptx::tma_prefetch_map(params.maps.q);
    ptx::tma_prefetch_map(params.maps.k);
    ptx::tma_prefetch_map(params.maps.v);
    ptx::tma_prefetch_map(params.maps.dout);
    shared.init_barriers();
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / ptx::kWarpgroupThreads, 0);  // known to be uniform
  if (warpgroup == 0) {
    ptx::release_registers<Config::kProducerRegisters>();
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    if (warp == 0) {
      load_backward(params, shared);
    } else if (warp <= Config::kConsumers) {
      add_query_gradients(params, shared, warp - 1);
    }
  } else {
    ptx::acquire_registers<Config::kConsumerRegisters>();
    consume_backward<Element>(params, shared, warpgroup - 1);
  }
}

}  // namespace flash_attn::sm90
