// Operators of inference attention: append to the cache, attend to it.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <optional>
#include <tuple>
#include <utility>

#include "../attention/decode/grid.h"
#include "../attention/decode/launch.h"
#include "allocate.h"
#include "attention_arguments.h"
#include "device.h"

namespace flash_attn::api {

namespace {

using decode::CacheLayout;
using OptionalTensor = std::optional<Tensor>;

bool is_16_bit(const Tensor& x) {
  return x.scalar_type() == ScalarType::Half || x.scalar_type() == ScalarType::BFloat16;
}

decode::NumberType number_type(const char* name, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Half:
      return decode::NumberType::kHalf;
    case ScalarType::BFloat16:
      return decode::NumberType::kBFloat16;
    case ScalarType::Float:
      return decode::NumberType::kFloat;
    default:
      STD_TORCH_CHECK(false, name, ": must be float16, bfloat16 or float32");
  }
}

// `batch` sequences; k_cache and v_cache are (entry, row, head, dim), or pages.
CacheLayout cache_layout(const Operand& k_cache, const Operand& v_cache, const Tensor& lengths,
                         const OptionalTensor& block_table, const OptionalTensor& cache_batch_idx,
                         const OptionalTensor& cache_leftpad, int64_t batch) {
  STD_TORCH_CHECK(
      is_16_bit(k_cache) && k_cache.dim() == 4 && v_cache.dim() == 4 && k_cache.stride(3) == 1 &&
          v_cache.stride(3) == 1 && v_cache.scalar_type() == k_cache.scalar_type(),
      "k_cache, v_cache: must be float16 or bfloat16 (entries or pages, rows, heads, dim), contiguous in the last");
  for (int64_t d = 0; d < 3; ++d) STD_TORCH_CHECK(k_cache.size(d) == v_cache.size(d), "k_cache, v_cache: sizes differ");
  CacheLayout cache{};
  cache.k = view_of(k_cache), cache.v = view_of(v_cache);
  cache.lengths = index_data("cache_seqlens", lengths, batch);
  cache.leftpad = index_data("cache_leftpad", cache_leftpad, batch);
  cache.entries = index_data("cache_batch_idx", cache_batch_idx, batch);
  cache.page_size = static_cast<int>(k_cache.size(1));
  cache.capacity = cache.page_size;
  cache.pages = static_cast<int>(k_cache.size(0));
  if (block_table.has_value()) {
    const Tensor& table = *block_table;
    STD_TORCH_CHECK(table.is_cuda() && table.scalar_type() == ScalarType::Int && table.dim() == 2 &&
                        (table.stride(1) == 1 || table.size(1) <= 1),
                    "block_table: must be int32 (entries, pages) with contiguous rows");
    cache.page_table = static_cast<const int*>(table.data_ptr());
    cache.page_table_stride = table.stride(0);
    cache.page_entries = static_cast<int>(table.size(0));
    cache.capacity = static_cast<int>(std::min<int64_t>(table.size(1) * k_cache.size(1), Window::kUnbounded - 1));
  }
  return cache;
}

// Rows of (batch, rows, ...) or packed (rows, ...) tensors.
RowLayout row_layout(const char* name, const OptionalTensor& cu_seqlens, const Operand& x, int64_t batch) {
  return {index_data(name, cu_seqlens, batch + 1), nullptr, static_cast<int>(x.size(x.dim() - 3)), INT_MAX};
}

Operand with_aligned_rows(const char* name, const Tensor& x, const Tensor& q) {
  Operand dense = with_dense_rows(name, x, x.dim(), q);
  if (has_aligned_rows(dense)) return dense;
  Tensor copy = new_contiguous(dense);
  torch::stable::copy_(copy, dense);
  return Operand(std::move(copy));
}

template <typename Function>
void for_element(const Tensor& x, const Function& function) {
  x.scalar_type() == ScalarType::BFloat16 ? function(__nv_bfloat16{}) : function(__half{});
}

}  // namespace

Tensor append_kv(Tensor k_cache_given, Tensor v_cache_given, Tensor k_given, Tensor v_given, Tensor cache_seqlens,
                 OptionalTensor q, OptionalTensor rotary_cos, OptionalTensor rotary_sin, bool interleaved,
                 bool q_per_position, OptionalTensor cache_batch_idx, OptionalTensor block_table,
                 OptionalTensor cu_seqlens_k_new, OptionalTensor cu_seqlens_q) {
  const torch::stable::accelerator::DeviceGuard guard(k_cache_given.get_device_index());
  const int64_t batch = cache_seqlens.size(0);
  const Operand k_cache(k_cache_given), v_cache(v_cache_given);
  const Operand k = with_dense_rows("k", k_given, k_given.dim(), k_cache);
  const Operand v = with_dense_rows("v", v_given, v_given.dim(), k_cache);
  decode::AppendParams params{};
  params.batch = static_cast<int>(batch);
  params.cache = cache_layout(k_cache, v_cache, cache_seqlens, block_table, cache_batch_idx, {}, batch);
  params.added = row_layout("cu_seqlens_k_new", cu_seqlens_k_new, k, batch);
  params.k = view_of(k), params.v = view_of(v);
  params.kv_heads = static_cast<int>(k.size(k.dim() - 2));
  params.head_dim = static_cast<int>(k.size(k.dim() - 1)), params.head_dim_v = static_cast<int>(v.size(v.dim() - 1));
  STD_TORCH_CHECK(
      params.kv_heads == k_cache.size(2) && params.head_dim == k_cache.size(3) && params.head_dim_v == v_cache.size(3),
      "k, v: heads and head dims must be those of the cache");
  std::optional<Operand> dense_q, rotated;
  if (q.has_value()) {
    const Operand& dense = dense_q.emplace(with_dense_rows("q", *q, q->dim(), k_cache));
    STD_TORCH_CHECK(dense.size(dense.dim() - 1) == params.head_dim, "q: head dim must be that of k_cache");
    rotated.emplace(new_contiguous(dense));
    params.queries = row_layout("cu_seqlens_q", cu_seqlens_q, dense, batch);
    params.heads = static_cast<int>(dense.size(dense.dim() - 2));
    params.q = view_of(dense), params.q_out = view_of(*rotated);
  }
  if (rotary_cos.has_value()) {
    STD_TORCH_CHECK(rotary_sin.has_value() && rotary_cos->dim() == 2 && rotary_cos->is_contiguous() &&
                        rotary_sin->is_contiguous() && rotary_cos->is_cuda() && rotary_sin->is_cuda() &&
                        rotary_sin->scalar_type() == rotary_cos->scalar_type() &&
                        rotary_sin->size(0) == rotary_cos->size(0) && rotary_sin->size(1) == rotary_cos->size(1) &&
                        rotary_cos->size(0) > 0 && 2 * rotary_cos->size(1) <= params.head_dim,
                    "rotary_cos, rotary_sin: must be contiguous (rows, rotary dim / 2) of one dtype on the GPU");
    params.cos = rotary_cos->data_ptr(), params.sin = rotary_sin->data_ptr();
    params.rotary_type = number_type("rotary_cos", *rotary_cos);
    params.rotary_rows = static_cast<int>(rotary_cos->size(0));
    params.rotary_dim = static_cast<int>(2 * rotary_cos->size(1));
  }
  params.interleaved = interleaved, params.q_per_position = q_per_position;
  for_element(k_cache,
              [&]<typename Element>(Element) { decode::launch_append<Element>(params, launch_target(k_cache)); });
  return rotated.has_value() ? Tensor(*rotated) : new_tensor(k_cache, {0}, k_cache.scalar_type());
}

std::tuple<Tensor, Tensor> decode_forward(Tensor q_given, Tensor k_cache_given, Tensor v_cache_given, Tensor seqlens_k,
                                          OptionalTensor block_table, OptionalTensor cache_batch_idx,
                                          OptionalTensor cache_leftpad, OptionalTensor cu_seqlens_q,
                                          double softmax_scale, int64_t window_left, int64_t window_right,
                                          double softcap, OptionalTensor alibi_slopes, OptionalTensor learnable_sink,
                                          int64_t num_splits, bool batch_invariant) {
  const torch::stable::accelerator::DeviceGuard guard(q_given.get_device_index());
  const bool packed = cu_seqlens_q.has_value();
  const int64_t dim = packed ? 3 : 4, batch = packed ? cu_seqlens_q->size(0) - 1 : q_given.size(0);
  STD_TORCH_CHECK(q_given.dim() == dim && is_16_bit(q_given),
                  "q: must be float16 or bfloat16 (batch, rows, heads, dim), or packed (rows, heads, dim)");
  STD_TORCH_CHECK(std::isfinite(softmax_scale) && num_splits >= 0, "softmax_scale, num_splits: out of range");
  const Operand q = with_aligned_rows("q", q_given, q_given);
  const Operand k_cache = with_aligned_rows("k_cache", k_cache_given, q);
  const Operand v_cache = with_aligned_rows("v_cache", v_cache_given, q);
  const int64_t rows = q.size(dim - 3), heads = q.size(dim - 2), kv_heads = k_cache.size(2);
  const int64_t head_dim = q.size(dim - 1), head_dim_v = v_cache.size(3);
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, "q: heads must be a multiple of the heads of k_cache");
  STD_TORCH_CHECK(rows * (heads / kv_heads) < Window::kUnbounded, "q: rows of one key-value head must be below 2^30");
  STD_TORCH_CHECK(k_cache.size(3) == head_dim && head_dim <= kMaxHeadDim && head_dim_v <= kMaxHeadDim &&
                      head_dim % 8 == 0 && head_dim_v % 8 == 0,
                  "head dims: must be equal for q and k_cache, multiples of 8 and at most ", kMaxHeadDim);
  const Operand out(packed ? new_tensor(q, {rows, heads, head_dim_v}, q.scalar_type())
                           : new_tensor(q, {batch, rows, heads, head_dim_v}, q.scalar_type()));
  const Tensor lse =
      packed ? new_tensor(q, {heads, rows}, ScalarType::Float) : new_tensor(q, {batch, heads, rows}, ScalarType::Float);
  const LaunchTarget target = launch_target(q);

  decode::DecodeParams params{};
  params.shape = {static_cast<int>(batch), static_cast<int>(heads), static_cast<int>(heads / kv_heads),
                  static_cast<int>(head_dim), static_cast<int>(head_dim_v)};
  params.queries = row_layout("cu_seqlens_q", cu_seqlens_q, q, batch);
  params.cache = cache_layout(k_cache, v_cache, seqlens_k, block_table, cache_batch_idx, cache_leftpad, batch);
  params.q = view_of(q), params.out = view_of(out);
  const auto side = [](int64_t size) {
    return size < 0 || size > Window::kUnbounded ? Window::kUnbounded : static_cast<int>(size);
  };
  params.window = {side(window_left), side(window_right), /*top_left=*/false};
  params.softmax_scale_log2 = static_cast<float>(softmax_scale * 1.4426950408889634);
  params.softcap = static_cast<float>(softcap);
  if (alibi_slopes.has_value()) {
    STD_TORCH_CHECK(alibi_slopes->is_cuda() && alibi_slopes->scalar_type() == ScalarType::Float &&
                        alibi_slopes->dim() == 2 && alibi_slopes->is_contiguous() && alibi_slopes->size(1) == heads &&
                        (alibi_slopes->size(0) == 1 || alibi_slopes->size(0) == batch),
                    "alibi_slopes: must be contiguous float32 (1 or batch, heads)");
    params.alibi_slopes = static_cast<const float*>(alibi_slopes->data_ptr());
    params.alibi_batch_stride = alibi_slopes->size(0) == 1 ? 0 : heads;
  }
  if (learnable_sink.has_value()) {
    STD_TORCH_CHECK(learnable_sink->is_cuda() && learnable_sink->scalar_type() == ScalarType::Float &&
                        learnable_sink->is_contiguous() && learnable_sink->numel() == heads,
                    "learnable_sink: must be contiguous float32 (heads)");
    params.learnable_sink = static_cast<const float*>(learnable_sink->data_ptr());
  }
  params.lse = static_cast<float*>(lse.data_ptr());
  params.lse_batch_stride = packed ? 0 : heads * rows, params.lse_head_stride = rows;

  decode::with_decode_config(
      params.shape.head_dim, params.shape.head_dim_v, target.shared_bytes_per_block, [&]<typename Config>(Config) {
        const decode::DecodeGrid grid =
            decode::decode_grid<Config>(params, num_splits, batch_invariant, target.multiprocessors);
        if (grid.items == 0) return;
        ScratchLayout layout;
        const bool has_parts = grid.slots > 0;
        const int64_t finished = layout.add(has_parts ? grid.items : 0);
        const int64_t lse_partial = layout.add(grid.slots * Config::kRows);
        const int64_t out_partial = layout.add(grid.slots * Config::kRows * Config::kHeadDimV);
        const Tensor scratch = new_tensor(q, {std::max<int64_t>(layout.bytes(), 1)}, ScalarType::Byte);
        char* base = static_cast<char*>(scratch.data_ptr());
        params.finished_parts = reinterpret_cast<int*>(base + finished);
        params.lse_partial = reinterpret_cast<float*>(base + lse_partial);
        params.out_partial = reinterpret_cast<float*>(base + out_partial);
        if (has_parts) {
          FLASH_ATTN_CUDA_CHECK(cudaMemsetAsync(base + finished, 0, grid.items * sizeof(int), target.stream));
        }
        for_element(q, [&]<typename Element>(Element) {
          decode::launch_decode<Element, Config::kHeadDim>(params, grid.blocks, target);
        });
      });
  return {out, lse};
}

STABLE_TORCH_LIBRARY_IMPL(flash_attn_kernels, CUDA, m) {
  m.impl("append_kv", TORCH_BOX(&append_kv));
  m.impl("decode", TORCH_BOX(&decode_forward));
}

}  // namespace flash_attn::api
