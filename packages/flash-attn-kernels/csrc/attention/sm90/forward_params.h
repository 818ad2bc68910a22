// What the host passes to the Hopper forward kernel.
#pragma once

#include <cuda.h>

#include "../params.h"
#include "tile_order.h"

namespace flash_attn::sm90 {

// The copy engine's view of (head dim, row, head, sequence) tensors; packed ones have one sequence.
struct TensorMaps {
  CUtensorMap q, k, v;
};

struct ForwardKernelParams {
  TensorMaps maps;
  ForwardParams attention;
  TileOrder order;
  int* tile_counter;  // hands out positions after the first of each block; null: by static_position()
};

}  // namespace flash_attn::sm90
