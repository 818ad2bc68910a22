// Operators of the sm90 attention path: outputs, tile counter, choice of the instantiation. The backward is prepared in
// attention_sm80.cu.
//
// Host code only: the kernels are instantiated in generated units, which alone are compiled for sm_90a.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <utility>

#include "../attention/head_dims.h"
#include "../attention/sm90/backward_launch.h"
#include "../attention/sm90/launch.h"
#include "allocate.h"
#include "attention_arguments.h"
#include "backward_call.h"
#include "device.h"
#include "forward_call.h"

namespace flash_attn::api {

namespace {

template <typename Element>
void launch(const ForwardParams& params, int* tile_counter, const LaunchTarget& target) {
  with_head_dims(params.shape.head_dim, params.shape.head_dim_v, [&]<typename Dims>(Dims) {
    params.modifiers.softcap > 0 ? sm90::launch_forward<Element, Dims, true>(params, tile_counter, target)
                                 : sm90::launch_forward<Element, Dims, false>(params, tile_counter, target);
  });
}

void run_sm90_forward(const ForwardParams& params, const Tensor& q) {
  const LaunchTarget target = launch_target(q);
  std::optional<Tensor> scratch;
  int* tile_counter = nullptr;
  if (sm90::needs_tile_counter(params, target.multiprocessors)) {
    scratch = new_tensor(q, {1}, ScalarType::Int);
    tile_counter = static_cast<int*>(scratch->data_ptr());
    FLASH_ATTN_CUDA_CHECK(cudaMemsetAsync(tile_counter, 0, sizeof(int), target.stream));
  }
  const auto run = q.scalar_type() == ScalarType::BFloat16 ? launch<__nv_bfloat16> : launch<__half>;
  run(params, tile_counter, target);
}

std::tuple<Tensor, Tensor> run(const AttentionArguments& arguments, const Tensor& q, const Tensor& k, const Tensor& v) {
  const DeviceLimits& limits = device_limits(q.get_device_index());
  STD_TORCH_CHECK(limits.capability_major == 9, "sm90_forward: q is on a device of compute capability ",
                  limits.capability_major, ".", limits.capability_minor,
                  ", and these kernels run on 9.x alone; sm80_forward runs on every device since 8.0");
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  ForwardCall call = forward_call(arguments, q, k, v);
  run_forward(call.params, call.q);
  return {std::move(call.out), std::move(call.lse)};
}

}  // namespace

void run_forward(const ForwardParams& params, const Tensor& q) {
  // Whether rows are aligned is decided here, since only here it is known for sure: a compiled graph is traced with
  // tensors that have no address, and later gets others.
  if (device_limits(q.get_device_index()).capability_major == 9 && sm90::can_run(params)) {
    run_sm90_forward(params, q);
  } else {
    run_sm80_forward(params, q);
  }
}

std::optional<BackwardTile> sm90_backward_tile(const BackwardParams& params, bool deterministic, const Tensor& q) {
  if (device_limits(q.get_device_index()).capability_major != 9 || deterministic || !sm90::has_backward(params.shape) ||
      sm90::has_few_queries(params) || needs_general(params.modifiers, params.softmax_scale)) {
    return std::nullopt;
  }
  return sm90::with_backward_head_dims(params.shape, []<typename Dims>(Dims) {
    using Config = typename sm90::BackwardConfigOf<Dims>::Config;
    return BackwardTile{Config::kRows, Config::kColumns, Config::kHeadDim};
  });
}

void run_sm90_backward(const BackwardParams& params, int* work_counter, const Tensor& q) {
  const LaunchTarget target = launch_target(q);
  sm90::with_backward_head_dims(params.shape, [&]<typename Dims>(Dims) {
    q.scalar_type() == ScalarType::BFloat16 ? sm90::launch_backward<__nv_bfloat16, Dims>(params, work_counter, target)
                                            : sm90::launch_backward<__half, Dims>(params, work_counter, target);
  });
}

std::tuple<Tensor, Tensor> sm90_forward(Tensor q, Tensor k, Tensor v, double softmax_scale, int64_t window_left,
                                        int64_t window_right, bool top_left, double softcap,
                                        std::optional<Tensor> learnable_sink, std::optional<Tensor> cu_seqlens_q,
                                        std::optional<Tensor> cu_seqlens_k, std::optional<Tensor> seqused_q,
                                        std::optional<Tensor> seqused_k) {
  return run({.softmax_scale = softmax_scale,
              .window_left = window_left,
              .window_right = window_right,
              .top_left = top_left,
              .softcap = softcap,
              .cu_seqlens_q = cu_seqlens_q,
              .cu_seqlens_k = cu_seqlens_k,
              .seqused_q = seqused_q,
              .seqused_k = seqused_k,
              .learnable_sink = learnable_sink},
             q, k, v);
}

std::tuple<Tensor, Tensor> sm90_forward_dense(Tensor q, Tensor k, Tensor v, double softmax_scale, bool causal) {
  return run(AttentionArguments::dense(softmax_scale, causal), q, k, v);
}

STABLE_TORCH_LIBRARY_IMPL(flash_attn_kernels, CUDA, m) {
  m.impl("sm90_forward", TORCH_BOX(&sm90_forward));
  m.impl("sm90_forward_dense", TORCH_BOX(&sm90_forward_dense));
}

}  // namespace flash_attn::api
