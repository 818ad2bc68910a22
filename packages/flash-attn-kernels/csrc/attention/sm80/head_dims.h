// Which variant runs which head dims.
#pragma once

#include "../head_dims.h"
#include "config.h"

namespace flash_attn::sm80 {

// Calls `function` with the smallest variant that holds the head dims; 1 <= head_dim, head_dim_v <= kMaxHeadDim.
template <typename Function>
auto with_variant(int head_dim, int head_dim_v, bool general, const Function& function) {
  if (!general) {
    return with_head_dims(head_dim, head_dim_v, [&]<typename Dims>(Dims) {
      return function(Variant<Dims::kHeadDim, Dims::kHeadDimV, false>{});
    });
  }
  const int larger = head_dim > head_dim_v ? head_dim : head_dim_v;
  if (larger <= 64) return function(Variant<64, 64, true>{});
  if (larger <= 128) return function(Variant<128, 128, true>{});
  return function(Variant<256, 256, true>{});
}

}  // namespace flash_attn::sm80
