// The head dims that kernels are compiled for: others run in the first pair that holds theirs.
#pragma once

namespace flash_attn {

constexpr int kMaxHeadDim = 256;

template <int kHeadDim_, int kHeadDimV_>
struct HeadDims {
  static constexpr int kHeadDim = kHeadDim_, kHeadDimV = kHeadDimV_;
};

// Calls `function` with the smallest HeadDims that hold both; 1 <= head_dim, head_dim_v <= kMaxHeadDim.
template <typename Function>
auto with_head_dims(int head_dim, int head_dim_v, const Function& function) {
  const auto holds = [&](int d, int d_v) { return head_dim <= d && head_dim_v <= d_v; };
  if (holds(64, 64)) return function(HeadDims<64, 64>{});
  if (holds(96, 96)) return function(HeadDims<96, 96>{});
  if (holds(128, 128)) return function(HeadDims<128, 128>{});
  if (holds(192, 128)) return function(HeadDims<192, 128>{});
  if (holds(192, 192)) return function(HeadDims<192, 192>{});
  return function(HeadDims<256, 256>{});
}

}  // namespace flash_attn
