// Operators of the sm80 attention path: argument checks, parameters, choice of the instantiation.
//
// Users meet the checks of the Python functions; the ones here only keep a direct caller from a bad launch.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <climits>
#include <optional>
#include <tuple>

#include "../attention/params.h"
#include "../attention/sm80/config.h"
#include "../attention/sm80/launch.h"
#include "../attention/visible_range.cuh"
#include "device.h"

namespace flash_attn::api {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

Tensor new_like(const Tensor& x) { return torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)}); }

TensorView view_of(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

// x itself where its rows can be copied in 16-byte chunks, otherwise a contiguous copy.
Tensor with_aligned_rows(const char* name, const Tensor& x, const Tensor& q) {
  STD_TORCH_CHECK(x.dim() == 4, name, ": got ", x.dim(), " dimensions, expected (batch, seqlen, heads, head_dim)");
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == q.get_device_index(), name, ": must be on the device of q");
  STD_TORCH_CHECK(x.scalar_type() == q.scalar_type(), name, ": must have the dtype of q");
  STD_TORCH_CHECK(x.size(1) < Window::kUnbounded, name, ": seqlen must be below 2^30");
  const bool aligned = x.stride(3) == 1 && reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0 &&
                       x.stride(0) % 8 == 0 && x.stride(1) % 8 == 0 && x.stride(2) % 8 == 0;
  if (aligned) return x;
  Tensor copy = new_like(x);
  torch::stable::copy_(copy, x);
  return copy;
}

ProblemShape check_problem(const Tensor& q, const Tensor& k, const Tensor& v, double softmax_scale) {
  STD_TORCH_CHECK(q.scalar_type() == ScalarType::Half || q.scalar_type() == ScalarType::BFloat16,
                  "q: must be float16 or bfloat16");
  STD_TORCH_CHECK(q.size(3) == k.size(3) && q.size(3) == v.size(3), "q, k, v: head dims must be equal");
  STD_TORCH_CHECK(q.size(3) == 64 || q.size(3) == 128, "q: got head_dim ", q.size(3), ", expected 64 or 128");
  STD_TORCH_CHECK(k.size(0) == q.size(0) && v.size(0) == q.size(0), "q, k, v: batch sizes must be equal");
  STD_TORCH_CHECK(k.size(1) == v.size(1) && k.size(2) == v.size(2), "k, v: shapes must be equal");
  STD_TORCH_CHECK(k.size(2) > 0 && q.size(2) % k.size(2) == 0, "q: heads must be a multiple of the heads of k");
  STD_TORCH_CHECK(softmax_scale > 0, "softmax_scale: must be positive");
  // One block per (batch, head, tile of at least 64 rows) has to fit a grid of 2^31 - 1 blocks.
  const int64_t blocks = q.size(0) * q.size(2) * (1 + (q.size(1) > k.size(1) ? q.size(1) : k.size(1)) / 64);
  STD_TORCH_CHECK(blocks <= INT_MAX, "q: batch * heads * seqlen is too large for one launch");
  return {static_cast<int>(q.size(0)), static_cast<int>(q.size(2)), static_cast<int>(q.size(2) / k.size(2)),
          static_cast<int>(q.size(1)), static_cast<int>(k.size(1))};
}

Window window_of(int64_t left, int64_t right) {
  const auto side = [](int64_t size) {
    return size < 0 || size > Window::kUnbounded ? Window::kUnbounded : static_cast<int>(size);
  };
  return {side(left), side(right)};
}

AttentionParams attention_params(const ProblemShape& shape, const Tensor& q, const Tensor& k, const Tensor& v,
                                 const Tensor& out, double softmax_scale, int64_t window_left, int64_t window_right) {
  return {
      .shape = shape,
      .window = window_of(window_left, window_right),
      .softmax_scale = static_cast<float>(softmax_scale),
      .softmax_scale_log2 = static_cast<float>(softmax_scale * 1.4426950408889634),
      .q = view_of(q),
      .k = view_of(k),
      .v = view_of(v),
      .out = view_of(out),
  };
}

Tensor new_scratch(const Tensor& like, int64_t elements, ScalarType dtype) {
  return torch::stable::new_empty(like, {elements}, dtype);
}

template <template <typename, int> typename Call, typename... Args>
void for_type_and_head_dim(const Tensor& q, Args&&... args) {
  const bool bf16 = q.scalar_type() == ScalarType::BFloat16;
  if (q.size(3) == 64) {
    bf16 ? Call<__nv_bfloat16, 64>::run(args...) : Call<__half, 64>::run(args...);
  } else {
    bf16 ? Call<__nv_bfloat16, 128>::run(args...) : Call<__half, 128>::run(args...);
  }
}

template <typename Element, int kHeadDim>
struct Forward {
  static void run(const ForwardParams& params, cudaStream_t stream) {
    sm80::launch_forward<Element, kHeadDim>(params, stream);
  }
};

template <typename Element, int kHeadDim>
struct Backward {
  static void run(const BackwardParams& params, int shared_bytes, cudaStream_t stream) {
    sm80::launch_backward<Element, kHeadDim>(params, shared_bytes, stream);
  }
};

}  // namespace

std::tuple<Tensor, Tensor> sm80_forward(Tensor q, Tensor k, Tensor v, double softmax_scale, int64_t window_left,
                                        int64_t window_right) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  q = with_aligned_rows("q", q, q), k = with_aligned_rows("k", k, q), v = with_aligned_rows("v", v, q);
  const ProblemShape shape = check_problem(q, k, v, softmax_scale);
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2), v.size(3)});
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(2), q.size(1)}, ScalarType::Float);
  const ForwardParams params{
      attention_params(shape, q, k, v, out, softmax_scale, window_left, window_right),
      static_cast<float*>(lse.data_ptr()),
  };
  for_type_and_head_dim<Forward>(q, params, current_stream(q));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> sm80_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
                                                 std::optional<Tensor> dlse, double softmax_scale, int64_t window_left,
                                                 int64_t window_right, bool deterministic) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  q = with_aligned_rows("q", q, q), k = with_aligned_rows("k", k, q), v = with_aligned_rows("v", v, q);
  out = with_aligned_rows("out", out, q), dout = with_aligned_rows("dout", dout, q);
  const ProblemShape shape = check_problem(q, k, v, softmax_scale);
  const auto check_lse = [&](const char* name, const Tensor& x) {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.dim() == 3 &&
                        x.size(0) == q.size(0) && x.size(1) == q.size(2) && x.size(2) == q.size(1),
                    name, ": must be contiguous float32 (batch, heads, seqlen)");
  };
  check_lse("lse", lse);
  if (dlse.has_value()) check_lse("dlse", *dlse);
  const cudaStream_t stream = current_stream(q);

  Tensor dq = new_like(q), dk = new_like(k), dv = new_like(v);

  const int shared_bytes = shared_bytes_per_block(q.get_device_index());
  const int rows = q.size(3) == 64 ? sm80::backward_rows<64>(shared_bytes) : sm80::backward_rows<128>(shared_bytes);
  const int query_tiles = ceil_div(shape.seqlen_q, rows);
  const int64_t tiles = static_cast<int64_t>(query_tiles) * shape.heads * shape.batch;
  Tensor lse_log2 = new_scratch(q, tiles * rows, ScalarType::Float);
  Tensor delta = new_scratch(q, tiles * rows, ScalarType::Float);
  const int64_t accumulator_elements = tiles * rows * q.size(3);
  Tensor dq_accumulator = new_scratch(q, accumulator_elements, ScalarType::Float);
  FLASH_ATTN_CUDA_CHECK(cudaMemsetAsync(dq_accumulator.data_ptr(), 0, accumulator_elements * sizeof(float), stream));
  Tensor dq_turn = new_scratch(q, deterministic ? tiles : 0, ScalarType::Int);
  if (deterministic) FLASH_ATTN_CUDA_CHECK(cudaMemsetAsync(dq_turn.data_ptr(), 0, tiles * sizeof(int), stream));

  const BackwardParams params{
      attention_params(shape, q, k, v, out, softmax_scale, window_left, window_right),
      /*dout=*/view_of(dout),
      /*dq=*/view_of(dq),
      /*dk=*/view_of(dk),
      /*dv=*/view_of(dv),
      /*lse=*/static_cast<const float*>(lse.data_ptr()),
      /*dlse=*/dlse.has_value() ? static_cast<const float*>(dlse->data_ptr()) : nullptr,
      /*query_tiles=*/query_tiles,
      /*lse_log2=*/static_cast<float*>(lse_log2.data_ptr()),
      /*delta=*/static_cast<float*>(delta.data_ptr()),
      /*dq_accumulator=*/static_cast<float*>(dq_accumulator.data_ptr()),
      /*dq_turn=*/deterministic ? static_cast<int*>(dq_turn.data_ptr()) : nullptr,
  };
  for_type_and_head_dim<Backward>(q, params, shared_bytes, stream);
  return {dq, dk, dv};
}

STABLE_TORCH_LIBRARY_IMPL(flash_attn_kernels, CUDA, m) {
  m.impl("sm80_forward", TORCH_BOX(&sm80_forward));
  m.impl("sm80_backward", TORCH_BOX(&sm80_backward));
}

}  // namespace flash_attn::api
