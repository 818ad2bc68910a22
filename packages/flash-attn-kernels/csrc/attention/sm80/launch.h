// The launchers that the generated instantiations provide.
#pragma once

#include "../launch.h"
#include "../params.h"
#include "config.h"

namespace flash_attn::sm80 {

// Slot counts and scratch in the parameters are filled in by the launchers' callers as far as they depend on the tile
// shape, see backward_tile().
template <typename Element, typename Variant>
void launch_forward(ForwardParams params, const LaunchTarget& target);

template <typename Element, typename Variant>
void launch_backward(const BackwardParams& params, const LaunchTarget& target);

// Gradients of one number per (sequence, head) from parts per (head, slot, part): a fixed order, so the same bits.
struct PartialSumParams {
  RowLayout layout;
  int batch, heads, tile_rows, slots, parts;  // slots of one head, parts of one slot
  const float* partial;
  float* total;  // (batch, heads)
};

void launch_partial_sum(const PartialSumParams& params, const LaunchTarget& target);

}  // namespace flash_attn::sm80
