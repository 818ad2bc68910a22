// Host side of the append kernel.

#include "append.cuh"
#include "launch.h"

namespace flash_attn::decode {

template <typename Element>
void launch_append(const AppendParams& params, const LaunchTarget& target) {
  launch<&append_kernel<Element>>(append_blocks(params), kAppendThreads, 0, target, params);
}

template void launch_append<__nv_bfloat16>(const AppendParams&, const LaunchTarget&);
template void launch_append<__half>(const AppendParams&, const LaunchTarget&);

}  // namespace flash_attn::decode
