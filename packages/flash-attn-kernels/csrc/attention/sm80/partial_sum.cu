// Sums of parts that blocks of the backward left behind.

#include "../sequence.cuh"
#include "launch.h"

namespace flash_attn::sm80 {

__global__ void __launch_bounds__(32) partial_sum_kernel(const __grid_constant__ PartialSumParams params) {
  const int index = static_cast<int>(blockIdx.x) / params.heads, head = static_cast<int>(blockIdx.x) % params.heads;
  const int first = first_slot(params.layout, index, params.tile_rows);
  const int end = first_slot(params.layout, index + 1, params.tile_rows);
  const float* partial = params.partial + static_cast<int64_t>(head) * params.slots * params.parts;
  float sum = 0.f;
  for (int64_t i = static_cast<int64_t>(first) * params.parts + threadIdx.x;
       i < static_cast<int64_t>(end) * params.parts; i += 32) {
    sum += partial[i];
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (threadIdx.x == 0) params.total[index * params.heads + head] = sum;
}

void launch_partial_sum(const PartialSumParams& params, const LaunchTarget& target) {
  launch<&partial_sum_kernel>(static_cast<int64_t>(params.batch) * params.heads, 32, 0, target, params);
}

}  // namespace flash_attn::sm80
