// The launchers that the generated instantiations of the Hopper kernels provide.
#pragma once

#include "../head_dims.h"
#include "../launch.h"
#include "../params.h"
#include "tile_order.h"

namespace flash_attn::sm90 {

// What these kernels can run: windows, packed sequences, sinks and softcap, on rows that the copy engine can move.
inline bool can_run(const AttentionParams& params) {
  const ModifierParams& modifiers = params.modifiers;
  return params.softmax_scale > 0 && modifiers.alibi_slopes == nullptr && !modifiers.bias.present &&
         !modifiers.mask.present && !modifiers.key_padding.present && modifiers.seed_and_offset == nullptr &&
         modifiers.aligned_rows && modifiers.pages.table == nullptr;
}

// tile_counter: a zeroed int on the device, or null. kSoftcap: whether the scores are soft-capped.
template <typename Element, typename Dims, bool kSoftcap>
void launch_forward(const ForwardParams& params, int* tile_counter, const LaunchTarget& target);

}  // namespace flash_attn::sm90
