// Operators of the sm80 attention path: outputs, scratch, choice of the instantiation. The sm90 path's backward differs
// in its kernels alone.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>
#include <tuple>
#include <utility>

#include "../attention/params.h"
#include "../attention/sequence.cuh"
#include "../attention/sm80/head_dims.h"
#include "../attention/sm80/launch.h"
#include "attention_arguments.h"
#include "backward_call.h"
#include "device.h"
#include "forward_call.h"
#include "operator_arguments.h"

namespace flash_attn::api {

namespace {

// Calls function(element, variant), both by value as tags.
template <typename Function>
void for_kernel(const Tensor& q, const AttentionParams& params, const Function& function) {
  const bool general = needs_general(params.modifiers, params.softmax_scale);
  sm80::with_variant(params.shape.head_dim, params.shape.head_dim_v, general, [&](auto variant) {
    q.scalar_type() == ScalarType::BFloat16 ? function(__nv_bfloat16{}, variant) : function(__half{}, variant);
  });
}

sm80::TileShape forward_tile(int head_dim, int head_dim_v, bool general, int shared_bytes) {
  return sm80::with_variant(head_dim, head_dim_v, general, [&]<typename Variant>(Variant) {
    return sm80::with_forward_config<Variant>(shared_bytes, []<typename Config>(Config) { return Config::kShape; });
  });
}

sm80::TileShape backward_tile(int head_dim, int head_dim_v, bool general, bool large_tiles, int shared_bytes) {
  return sm80::with_variant(head_dim, head_dim_v, general, [&]<typename Variant>(Variant) {
    return sm80::with_backward_config<Variant>(large_tiles, shared_bytes,
                                               []<typename Config>(Config) { return Config::kShape; });
  });
}

float* float_data(const Tensor& x) { return static_cast<float*>(x.data_ptr()); }

// Into how many parts the query heads of one key-value head are divided among blocks, so that few long sequences with
// few key-value heads still fill the device.
int group_splits(const AttentionParams& params, int key_slots, int multiprocessors) {
  const int group = params.shape.heads_per_kv_head;
  const int64_t blocks = static_cast<int64_t>(key_slots) * (params.shape.heads / group);
  if (blocks == 0) return 1;
  return static_cast<int>(std::clamp<int64_t>(2 * multiprocessors / blocks, 1, group));
}

// As many heads as it takes that blocks which run together seldom add to the same tile of dQ: their key tiles then
// outnumber what the device runs at a time (at most two blocks per multiprocessor).
int deterministic_interleave(const BackwardParams& params, int multiprocessors) {
  if (params.window.right != Window::kUnbounded) return 1;  // no block waits for its first turn, see BackwardWork
  const int heads = params.shape.heads / params.shape.heads_per_kv_head * params.group_splits;
  const int tiles = std::max(params.key_slots / std::max(params.shape.batch, 1), 1);
  return std::clamp(2 * multiprocessors / tiles, 1, heads);
}

}  // namespace

void run_sm80_forward(const ForwardParams& params, const Tensor& q) {
  const LaunchTarget target = launch_target(q);
  for_kernel(q, params, [&]<typename Element, typename Variant>(Element, Variant) {
    sm80::launch_forward<Element, Variant>(params, target);
  });
}

std::tuple<Tensor, Tensor> sm80_forward(Tensor q, Tensor k, Tensor v, FLASH_ATTN_PARAMETERS) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  ForwardCall call = forward_call({FLASH_ATTN_ARGUMENTS}, q, k, v);
  run_sm80_forward(call.params, call.q);
  return {std::move(call.out), std::move(call.lse)};
}

std::tuple<Tensor, Tensor> sm80_forward_dense(Tensor q, Tensor k, Tensor v, double softmax_scale, bool causal) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  ForwardCall call = forward_call(AttentionArguments::dense(softmax_scale, causal), q, k, v);
  run_sm80_forward(call.params, call.q);
  return {std::move(call.out), std::move(call.lse)};
}

namespace {

// What is asked of a backward besides the arguments of its forward.
struct BackwardRequest {
  bool deterministic;
  std::optional<Tensor> dlse;
  bool needs_attn_bias, needs_alibi_slopes, needs_learnable_sink;
  bool one_gradient;
  bool prefers_sm90;
};

// Of q, k and v: the tensors, and where each is written.
struct InputGradients {
  Operand dq, dk, dv;
  TensorView dq_view, dk_view, dv_view;

  static InputGradients apart(const Operand& q, const Operand& k, const Operand& v) {
    const Operand dq(new_contiguous(q)), dk(new_contiguous(k)), dv(new_contiguous(v));
    return {dq, dk, dv, view_of(dq), view_of(dk), view_of(dv)};
  }

  // The heads of q, k and v follow each other in one tensor, which is the first of the three.
  static InputGradients in_one(const Operand& q, const Operand& k, const Operand& v) {
    const int64_t head = q.dim() - 2, heads = q.size(head), kv_heads = k.size(head), head_dim = q.size(head + 1);
    int64_t sizes[kMaxDims];
    for (int64_t d = 0; d < q.dim(); ++d) {
      sizes[d] = q.size(d);
      STD_TORCH_CHECK(d == head || (k.size(d) == sizes[d] && v.size(d) == sizes[d]),
                      "one_gradient: q, k and v must be equal in all sizes but the heads");
    }
    STD_TORCH_CHECK(v.size(head) == kv_heads, "one_gradient: k and v must have as many heads");
    sizes[head] = heads + 2 * kv_heads;
    const Operand all(new_tensor(q, std::span<const int64_t>(sizes, q.dim()), q.scalar_type()));
    const auto nothing = [&] { return Operand(new_tensor(q, {0}, q.scalar_type())); };
    TensorView view = view_of(all);
    const auto from_head = [&](int64_t first) {
      TensorView part = view;
      part.data = static_cast<uint16_t*>(view.data) + first * head_dim;
      return part;
    };
    return {all, nothing(), nothing(), view, from_head(heads), from_head(heads + kv_heads)};
  }
};

using BackwardResults =
    std::tuple<Tensor, Tensor, Tensor, std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>>;

// How many heads take turns on Hopper. Blocks that add to different tiles of dQ do not hinder each other. Under a
// causal mask the long tiles of keys should also come first, of as many heads as the L2 cache holds queries, dO and dQ
// of.
int sm90_interleave(const BackwardParams& params, int head_dim) {
  constexpr int kFew = 4;
  constexpr int64_t kCacheBytes = 32 << 20;
  const int heads = params.shape.heads / params.shape.heads_per_kv_head * params.group_splits;
  const int few = std::min(kFew, heads);
  const bool packed = params.queries.cu_seqlens != nullptr;
  if (!packed && params.window.right == Window::kUnbounded) return few;
  const int64_t rows = packed ? params.queries.rows / std::max(params.shape.batch, 1) : params.queries.rows;
  const int64_t head_bytes = std::max<int64_t>(rows, 1) * head_dim * 8 * params.shape.heads_per_kv_head;
  return static_cast<int>(std::clamp<int64_t>(kCacheBytes / head_bytes, few, heads));
}

BackwardResults run_backward(const AttentionArguments& arguments, const Tensor& dout_given, const Tensor& q_given,
                             const Tensor& k_given, const Tensor& v_given, const Tensor& out_given, const Tensor& lse,
                             const BackwardRequest& request) {
  const auto& [deterministic, dlse, needs_attn_bias, needs_alibi_slopes, needs_learnable_sink, one_gradient,
               prefers_sm90] = request;
  STD_TORCH_CHECK(!arguments.paged(), "block_table: paged keys have no backward");
  const torch::stable::accelerator::DeviceGuard guard(q_given.get_device_index());
  const int64_t dim = arguments.packed() ? 3 : 4;
  const Operand q = with_dense_rows("q", q_given, dim, q_given);
  const Operand k = with_dense_rows("k", k_given, dim, q), v = with_dense_rows("v", v_given, dim, q);
  const Operand out = with_dense_rows("out", out_given, dim, q), dout = with_dense_rows("dout", dout_given, dim, q);
  const auto check_lse = [&](const char* name, const Tensor& x) {
    STD_TORCH_CHECK(x.is_cuda() && x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.dim() == dim - 1 &&
                        (dim == 3 || x.size(0) == q.size(0)) && x.size(dim - 3) == q.size(dim - 2) &&
                        x.size(dim - 2) == q.size(dim - 3),
                    name, ": must be contiguous float32 ([batch,] heads, queries) on the GPU");
  };
  check_lse("lse", lse);
  if (dlse.has_value()) check_lse("dlse", *dlse);

  const auto [dq, dk, dv, dq_view, dk_view, dv_view] =
      one_gradient ? InputGradients::in_one(q, k, v) : InputGradients::apart(q, k, v);
  BackwardParams params{attention_params(arguments, q, k, v, out, {&q, &k, &v, &out, &dout, &dq, &dk, &dv})};
  const ProblemShape& shape = params.shape;
  const DeviceLimits& limits = device_limits(q.get_device_index());
  const bool general = needs_general(params.modifiers, params.softmax_scale);
  const int mean_rows = arguments.packed() ? params.keys.rows / std::max(shape.batch, 1) : params.keys.rows;
  params.large_tiles = deterministic && (params.window.right == Window::kUnbounded || mean_rows > 1024);
  const sm80::TileShape sm80_tile =
      backward_tile(shape.head_dim, shape.head_dim_v, general, params.large_tiles, limits.shared_bytes_per_block);
  const std::optional<BackwardTile> sm90_tile =
      prefers_sm90 ? sm90_backward_tile(params, deterministic, q) : std::nullopt;
  const BackwardTile tile = sm90_tile.value_or(BackwardTile{sm80_tile.rows, sm80_tile.columns, sm80_tile.head_dim});
  params.dout = view_of(dout), params.dq = dq_view, params.dk = dk_view, params.dv = dv_view;
  params.lse = float_data(lse);
  params.dlse = dlse.has_value() ? float_data(*dlse) : nullptr;
  params.query_slots = slot_count(params.queries, shape.batch, tile.rows);
  params.key_slots = slot_count(params.keys, shape.batch, tile.columns);
  params.group_splits = group_splits(params, params.key_slots, limits.multiprocessors);
  params.head_interleave = sm90_tile.has_value() ? sm90_interleave(params, tile.head_dim)
                           : deterministic       ? deterministic_interleave(params, limits.multiprocessors)
                                                 : 1;

  const int64_t query_tiles = static_cast<int64_t>(params.query_slots) * shape.heads;
  const int64_t key_tiles = static_cast<int64_t>(params.key_slots) * shape.heads;
  const int64_t parts = params.group_splits > 1 ? params.group_splits : 0;
  ScratchLayout layout;
  const int64_t work_counter = layout.add(sm90_tile.has_value() ? 1 : 0);
  const int64_t dq_accumulator = layout.add(query_tiles * tile.rows * tile.head_dim);
  const int64_t dq_turn = layout.add(deterministic ? query_tiles : 0);
  const int64_t slope_partial = layout.add(needs_alibi_slopes ? key_tiles * sm80_tile.warps : 0);
  // The sm90 kernels clear the accumulator themselves.
  const int64_t zeroed_bytes = sm90_tile.has_value() ? dq_accumulator : layout.bytes();
  const int64_t lse_log2 = layout.add(query_tiles * tile.rows), delta = layout.add(query_tiles * tile.rows);
  const int64_t dk_partial = layout.add(parts * k.numel()), dv_partial = layout.add(parts * v.numel());
  const int64_t sink_partial = layout.add(needs_learnable_sink ? query_tiles : 0);
  const Tensor scratch = new_tensor(q, {layout.bytes()}, ScalarType::Byte);
  const LaunchTarget target = launch_target(q);
  if (zeroed_bytes > 0) FLASH_ATTN_CUDA_CHECK(cudaMemsetAsync(scratch.data_ptr(), 0, zeroed_bytes, target.stream));
  const auto floats = [base = static_cast<char*>(scratch.data_ptr())](int64_t offset) {
    return reinterpret_cast<float*>(base + offset);
  };
  params.lse_log2 = floats(lse_log2), params.delta = floats(delta);
  params.dq_accumulator = floats(dq_accumulator);
  params.dq_turn = deterministic ? reinterpret_cast<int*>(floats(dq_turn)) : nullptr;
  params.dk_partial = parts > 0 ? floats(dk_partial) : nullptr;
  params.dv_partial = parts > 0 ? floats(dv_partial) : nullptr;
  params.sink_partial = needs_learnable_sink ? floats(sink_partial) : nullptr;
  params.slope_partial = needs_alibi_slopes ? floats(slope_partial) : nullptr;

  std::optional<Tensor> dbias, dslopes, dsink;
  if (needs_attn_bias) {
    STD_TORCH_CHECK(arguments.attn_bias.has_value(), "needs_attn_bias: there is no attn_bias");
    const Tensor& bias = *arguments.attn_bias;
    // Every score of a dense call has its own entry of a full bias; any other is a sum, in fp32.
    params.dbias_is_stored = !arguments.packed() && bias.size(0) == shape.batch && bias.size(1) == shape.heads &&
                             bias.size(2) == params.queries.rows && bias.size(3) == params.keys.rows;
    dbias =
        torch::stable::new_zeros(bias, bias.sizes(), params.dbias_is_stored ? bias.scalar_type() : ScalarType::Float);
    params.dbias = score_tensor("dbias", *dbias, shape);
    if (params.dbias_is_stored) {  // a size of 1 is not broadcast, then
      params.dbias.rows = params.queries.rows, params.dbias.columns = params.keys.rows;
    }
  }
  if (sm90_tile.has_value()) {
    run_sm90_backward(params, reinterpret_cast<int*>(floats(work_counter)), q);
  } else {
    for_kernel(q, params, [&]<typename Element, typename Variant>(Element, Variant) {
      sm80::launch_backward<Element, Variant>(params, target);
    });
  }
  if (needs_alibi_slopes) {
    dslopes = new_tensor(q, {shape.batch, shape.heads}, ScalarType::Float);
    sm80::launch_partial_sum({params.keys, shape.batch, shape.heads, tile.columns, params.key_slots, sm80_tile.warps,
                              params.slope_partial, float_data(*dslopes)},
                             target);
  }
  if (needs_learnable_sink) {
    dsink = new_tensor(q, {shape.batch, shape.heads}, ScalarType::Float);
    sm80::launch_partial_sum({params.queries, shape.batch, shape.heads, tile.rows, params.query_slots, 1,
                              params.sink_partial, float_data(*dsink)},
                             target);
  }
  return {dq, dk, dv, dbias, dslopes, dsink};
}

}  // namespace

BackwardResults sm80_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, bool deterministic,
                              FLASH_ATTN_PARAMETERS, std::optional<Tensor> dlse, bool needs_attn_bias,
                              bool needs_alibi_slopes, bool needs_learnable_sink, bool one_gradient) {
  return run_backward(
      {FLASH_ATTN_ARGUMENTS}, dout, q, k, v, out, lse,
      {deterministic, dlse, needs_attn_bias, needs_alibi_slopes, needs_learnable_sink, one_gradient, false});
}

BackwardResults sm90_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, bool deterministic,
                              FLASH_ATTN_PARAMETERS, std::optional<Tensor> dlse, bool needs_attn_bias,
                              bool needs_alibi_slopes, bool needs_learnable_sink, bool one_gradient) {
  return run_backward(
      {FLASH_ATTN_ARGUMENTS}, dout, q, k, v, out, lse,
      {deterministic, dlse, needs_attn_bias, needs_alibi_slopes, needs_learnable_sink, one_gradient, true});
}

namespace {

std::tuple<int64_t, int64_t, int64_t, int64_t> numbers(const sm80::TileShape& tile) {
  return {tile.rows, tile.columns, tile.warps, tile.shared_bytes};
}

}  // namespace

std::tuple<int64_t, int64_t, int64_t, int64_t> sm80_forward_tile(int64_t head_dim, int64_t head_dim_v, bool general,
                                                                 int64_t shared_bytes) {
  return numbers(
      forward_tile(static_cast<int>(head_dim), static_cast<int>(head_dim_v), general, static_cast<int>(shared_bytes)));
}

std::tuple<int64_t, int64_t, int64_t, int64_t> sm80_backward_tile(int64_t head_dim, int64_t head_dim_v, bool general,
                                                                  bool large_tiles, int64_t shared_bytes) {
  return numbers(backward_tile(static_cast<int>(head_dim), static_cast<int>(head_dim_v), general, large_tiles,
                               static_cast<int>(shared_bytes)));
}

STABLE_TORCH_LIBRARY_IMPL(flash_attn_kernels, CUDA, m) {
  m.impl("sm80_forward", TORCH_BOX(&sm80_forward));
  m.impl("sm80_forward_dense", TORCH_BOX(&sm80_forward_dense));
  m.impl("sm80_backward", TORCH_BOX(&sm80_backward));
  m.impl("sm90_backward", TORCH_BOX(&sm90_backward));
}

STABLE_TORCH_LIBRARY_IMPL(flash_attn_kernels, CompositeImplicitAutograd, m) {
  m.impl("sm80_forward_tile", TORCH_BOX(&sm80_forward_tile));
  m.impl("sm80_backward_tile", TORCH_BOX(&sm80_backward_tile));
}

}  // namespace flash_attn::api
