// The launchers of inference attention.
#pragma once

#include "../launch.h"
#include "config.h"
#include "params.h"

namespace flash_attn::decode {

// With the configuration that with_decode_config() chooses.
template <typename Element, int kHeadDim>
void launch_decode(const DecodeParams& params, int64_t blocks, const LaunchTarget& target);

template <typename Element>
void launch_append(const AppendParams& params, const LaunchTarget& target);

}  // namespace flash_attn::decode
