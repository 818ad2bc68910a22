// Host side of the decode kernel.
#pragma once

#include "decode.cuh"
#include "launch.h"

namespace flash_attn::decode {

template <typename Element, int kHeadDim>
void launch_decode(const DecodeParams& params, int64_t blocks, const LaunchTarget& target) {
  with_fitting_config(
      typename DecodeConfigs<kHeadDim>::List{}, target.shared_bytes_per_block, [&]<typename Config>(Config) {
        launch<&decode_kernel<Element, Config>>(blocks, Config::kThreads, Config::kSharedBytes, target, params);
      });
}

}  // namespace flash_attn::decode
