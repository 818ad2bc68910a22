// Which variant runs which head dims.
#pragma once

#include "config.h"

namespace flash_attn::sm80 {

constexpr int kMaxHeadDim = 256;

// Calls `function` with the smallest variant that holds the head dims; 1 <= head_dim, head_dim_v <= kMaxHeadDim.
template <typename Function>
auto with_variant(int head_dim, int head_dim_v, bool general, const Function& function) {
  const auto holds = [&](int d, int d_v) { return head_dim <= d && head_dim_v <= d_v; };
  if (general) {
    if (holds(64, 64)) return function(Variant<64, 64, true>{});
    if (holds(128, 128)) return function(Variant<128, 128, true>{});
    return function(Variant<256, 256, true>{});
  }
  if (holds(64, 64)) return function(Variant<64, 64, false>{});
  if (holds(96, 96)) return function(Variant<96, 96, false>{});
  if (holds(128, 128)) return function(Variant<128, 128, false>{});
  if (holds(192, 128)) return function(Variant<192, 128, false>{});
  if (holds(192, 192)) return function(Variant<192, 192, false>{});
  return function(Variant<256, 256, false>{});
}

}  // namespace flash_attn::sm80
