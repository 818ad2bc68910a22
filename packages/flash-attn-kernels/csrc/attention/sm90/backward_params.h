// What the host passes to the Hopper backward kernel.
#pragma once

#include <cuda.h>

#include "../params.h"

namespace flash_attn::sm90 {

// The copy engine's view of (head dim, row, head, sequence) tensors; packed ones have one sequence.
struct BackwardMaps {
  CUtensorMap q, k, v, dout;
};

struct BackwardKernelParams {
  BackwardMaps maps;
  BackwardParams attention;
  int works;          // (tile of keys, key-value head, part of its query heads)
  int* work_counter;  // zero at first; hands out works after the first of each block
};

}  // namespace flash_attn::sm90
