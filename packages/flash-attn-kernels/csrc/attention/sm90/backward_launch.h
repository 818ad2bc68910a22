// The launcher of the Hopper backward that the generated instantiations provide, and what it can run.
#pragma once

#include <algorithm>

#include "../launch.h"
#include "../params.h"
#include "backward_config.h"

namespace flash_attn::sm90 {

// The head dims that it is compiled for; up to 96, and above 128, the sm80 kernels are as good or the only ones.
inline bool has_backward(const ProblemShape& shape) {
  const int larger = std::max(shape.head_dim, shape.head_dim_v);
  return larger <= 64 || (larger > 96 && larger <= 128);
}

// Whether sequences have so few queries that the sm80 kernels are faster, at head dims up to 64: their tiles are of 64
// rows, not of 128.
inline bool has_few_queries(const BackwardParams& params) {
  constexpr int kSmallTile = 64, kFew = 192, kFewPacked = 256;
  if (std::max(params.shape.head_dim, params.shape.head_dim_v) > 64) return false;
  const int rows = params.queries.rows;
  if (params.queries.cu_seqlens != nullptr) return rows < int64_t{kFewPacked} * params.shape.batch;  // the mean
  return rows <= kFew && (rows + kSmallTile - 1) / kSmallTile % 2 == 1;  // half of the last large tile is empty
}

// Calls `function` with the HeadDims that hold those of a shape that has a backward.
template <typename Function>
auto with_backward_head_dims(const ProblemShape& shape, const Function& function) {
  return std::max(shape.head_dim, shape.head_dim_v) <= 64 ? function(HeadDims<64, 64>{})
                                                          : function(HeadDims<128, 128>{});
}

// As sm80::launch_backward; the accumulator of dQ need not be zeroed. work_counter: a zeroed int on the device.
template <typename Element, typename Dims>
void launch_backward(const BackwardParams& params, int* work_counter, const LaunchTarget& target);

}  // namespace flash_attn::sm90
