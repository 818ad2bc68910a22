// Operators of inference attention: append to the cache, attend to it, or both.

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
#include "cache_arguments.h"
#include "device.h"
#include "forward_call.h"

namespace flash_attn::api {

namespace {

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

Operand with_aligned_rows(Operand x) {
  if (has_aligned_rows(x)) return x;
  Tensor copy = new_contiguous(x);
  torch::stable::copy_(copy, x);
  return Operand(std::move(copy));
}

template <typename Function>
void for_element(const Tensor& x, const Function& function) {
  x.scalar_type() == ScalarType::BFloat16 ? function(__nv_bfloat16{}) : function(__half{});
}

// What an append leaves for the kernel behind it.
struct AppendResults {
  int* zeroed = nullptr;  // integers set to 0
  int64_t zeroed_count = 0;
  int* lengths_after = nullptr;
};

// Writes the new rows. q, if it is given, is rotated and returned.
std::optional<Operand> run_append(const CacheArguments& cache, const AppendedArguments& added,
                                  const std::optional<Operand>& q, const OptionalTensor& cu_seqlens_q,
                                  const AppendResults& results, const LaunchTarget& target) {
  decode::AppendParams params{};
  params.batch = static_cast<int>(cache.batch());
  params.cache = cache.layout();
  params.added = row_layout("cu_seqlens_k_new", added.cu_seqlens, added.k, params.batch);
  params.k = view_of(added.k), params.v = view_of(added.v);
  params.kv_heads = static_cast<int>(cache.k.size(2));
  params.head_dim = static_cast<int>(cache.k.size(3)), params.head_dim_v = static_cast<int>(cache.v.size(3));
  params.zeroed = results.zeroed, params.zeroed_count = static_cast<int>(results.zeroed_count);
  params.lengths_after = results.lengths_after;
  std::optional<Operand> rotated;
  if (q.has_value()) {
    STD_TORCH_CHECK(q->size(q->dim() - 1) == params.head_dim, "q: head dim must be that of k_cache");
    STD_TORCH_CHECK(cu_seqlens_q.has_value() || q->size(0) == params.batch, "q: batch must be that of cache_seqlens");
    rotated.emplace(new_contiguous(*q));
    params.queries = row_layout("cu_seqlens_q", cu_seqlens_q, *q, params.batch);
    params.heads = static_cast<int>(q->size(q->dim() - 2));
    params.q = view_of(*q), params.q_out = view_of(*rotated);
  }
  if (added.rotates()) {
    params.cos = added.cos->data_ptr(), params.sin = added.sin->data_ptr();
    params.rotary_type = number_type("rotary_cos", *added.cos);
    params.rotary_rows = static_cast<int>(added.cos->size(0));
    params.rotary_dim = static_cast<int>(2 * added.cos->size(1));
  }
  params.interleaved = added.interleaved, params.q_per_position = added.q_per_position;
  for_element(cache.k, [&]<typename Element>(Element) { decode::launch_append<Element>(params, target); });
  return rotated;
}

struct DecodeOptions {
  double softmax_scale;
  int64_t window_left, window_right;
  double softcap;
  int64_t num_splits;
  bool batch_invariant;
  OptionalTensor cu_seqlens_q, alibi_slopes, learnable_sink;
};

// Whether the kernels for training are faster. They read the keys once for each of their tiles of queries and not for
// 16 rows, but they do not cut the keys, so that few queries keep few multiprocessors busy, and they know no left
// padding.
bool prefers_forward(const decode::DecodeParams& params, const DecodeOptions& options, const Tensor& q) {
  if (options.num_splits != 0 || options.batch_invariant || params.cache.leftpad != nullptr) return false;
  const DeviceLimits& limits = device_limits(q.get_device_index());
  const bool paged = params.cache.page_table != nullptr || params.cache.entries != nullptr;
  const bool on_sm90 = limits.capability_major == 9 && !paged && params.alibi_slopes == nullptr;
  // With all multiprocessors busy and full tiles, so many times as fast as the decode kernel; measured on an H100.
  const double speed = on_sm90 ? 10 : paged ? 2.4 : 5;
  const int64_t tile_rows = on_sm90 ? 128 : 64;
  const int64_t sequences = std::max(params.shape.batch, 1);
  const int64_t rows = params.queries.cu_seqlens == nullptr ? params.queries.rows : params.queries.rows / sequences;
  const int64_t tiles = (rows + tile_rows - 1) / tile_rows, blocks = sequences * params.shape.heads * tiles;
  const double busy = std::min(1.0, static_cast<double>(blocks) / limits.multiprocessors);
  return speed * busy * rows > tiles * tile_rows;
}

// The call for the kernels for training. `lengths` are those after the append.
ForwardParams forward_params(const decode::DecodeParams& decode, double softmax_scale, const int* lengths,
                             bool aligned_rows) {
  const decode::CacheLayout& cache = decode.cache;
  ForwardParams params{};
  params.shape = decode.shape;
  params.queries = decode.queries;
  params.keys = {nullptr, lengths, cache.page_size, cache.capacity};
  params.window = decode.window;
  params.softmax_scale = static_cast<float>(softmax_scale), params.softmax_scale_log2 = decode.softmax_scale_log2;
  params.q = decode.q, params.k = cache.k, params.v = cache.v, params.out = decode.out;
  params.lse = decode.lse;
  params.lse_batch_stride = decode.lse_batch_stride, params.lse_head_stride = decode.lse_head_stride;
  params.learnable_sink = decode.learnable_sink;
  params.modifiers.softcap = decode.softcap;
  params.modifiers.keep_scale = 1.f;
  params.modifiers.alibi_slopes = decode.alibi_slopes;
  params.modifiers.alibi_batch_stride = decode.alibi_batch_stride;
  params.modifiers.aligned_rows = aligned_rows;
  PageLayout pages{cache.page_table, cache.page_table_stride, cache.entries,       cache.page_entries, cache.page_size,
                   cache.pages,      cache.k.batch_stride,    cache.v.batch_stride};
  if (pages.table == nullptr && cache.entries != nullptr) {  // an entry is a page, and the list of them the table
    pages.table = cache.entries, pages.table_stride = 1, pages.entries = nullptr,
    pages.table_entries = decode.shape.batch;
  }
  if (pages.table != nullptr) {
    params.modifiers.pages = pages;
    params.keys.rows = INT_MAX;
    params.k.batch_stride = params.v.batch_stride = 0;
  }
  return params;
}

// Attends to the caches, which first get the new rows if there are any.
std::tuple<Tensor, Tensor> run_decode(const Tensor& q_given, const CacheArguments& cache,
                                      const AppendedArguments* added, const DecodeOptions& options) {
  const bool packed = options.cu_seqlens_q.has_value();
  const int64_t dim = packed ? 3 : 4, batch = cache.batch();
  Operand q = with_dense_rows("q", q_given, dim, cache.k);
  STD_TORCH_CHECK(packed || q.size(0) == batch, "q: batch must be that of cache_seqlens");
  STD_TORCH_CHECK(std::isfinite(options.softmax_scale) && options.num_splits >= 0,
                  "softmax_scale, num_splits: out of range");
  const int64_t rows = q.size(dim - 3), heads = q.size(dim - 2), kv_heads = cache.k.size(2);
  const int64_t head_dim = q.size(dim - 1), head_dim_v = cache.v.size(3);
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, "q: heads must be a multiple of the heads of k_cache");
  STD_TORCH_CHECK(rows * (heads / kv_heads) < Window::kUnbounded, "q: rows of one key-value head must be below 2^30");
  STD_TORCH_CHECK(cache.k.size(3) == head_dim && head_dim <= kMaxHeadDim && head_dim_v <= kMaxHeadDim &&
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
  params.queries = row_layout("cu_seqlens_q", options.cu_seqlens_q, q, batch);
  params.cache = cache.layout();
  params.out = view_of(out);
  params.window = {window_side(options.window_left), window_side(options.window_right), /*top_left=*/false};
  params.softmax_scale_log2 = static_cast<float>(options.softmax_scale * 1.4426950408889634);
  params.softcap = static_cast<float>(options.softcap);
  params.alibi_slopes = alibi_slopes_data(options.alibi_slopes, params.shape, params.alibi_batch_stride);
  params.learnable_sink = learnable_sink_data(options.learnable_sink, heads);
  params.lse = static_cast<float*>(lse.data_ptr());
  params.lse_batch_stride = packed ? 0 : heads * rows, params.lse_head_stride = rows;
  if (added != nullptr) params.added = row_layout("cu_seqlens_k_new", added->cu_seqlens, added->k, batch);

  std::optional<Operand> rotated;
  const auto append = [&](const AppendResults& results) {
    const std::optional<Operand> turned = added->rotates() ? std::optional(q) : std::nullopt;
    rotated = run_append(cache, *added, turned, options.cu_seqlens_q, results, target);
    if (rotated.has_value()) q = *rotated;
  };
  if (prefers_forward(params, options, q)) {
    const Tensor lengths = added == nullptr ? cache.seqlens : new_tensor(q, {batch}, ScalarType::Int);
    if (added != nullptr) append({.lengths_after = static_cast<int*>(lengths.data_ptr())});
    params.q = view_of(q);
    run_forward(forward_params(params, options.softmax_scale, static_cast<const int*>(lengths.data_ptr()),
                               has_aligned_rows(q) && has_aligned_rows(cache.k) && has_aligned_rows(cache.v)),
                q);
    return {out, lse};
  }
  decode::with_decode_config(
      params.shape.head_dim, params.shape.head_dim_v, target.shared_bytes_per_block, [&]<typename Config>(Config) {
        const decode::DecodeGrid grid =
            decode::decode_grid<Config>(params, options.num_splits, options.batch_invariant, target.multiprocessors);
        ScratchLayout layout;
        const int64_t counters = grid.slots > 0 ? grid.items : 0;
        const int64_t finished = layout.add(counters);
        const int64_t lse_partial = layout.add(grid.slots * Config::kRows);
        const int64_t out_partial = layout.add(grid.slots * Config::kRows * Config::kHeadDimV);
        const Tensor scratch = new_tensor(q, {std::max<int64_t>(layout.bytes(), 1)}, ScalarType::Byte);
        char* base = static_cast<char*>(scratch.data_ptr());
        params.finished_parts = reinterpret_cast<int*>(base + finished);
        params.lse_partial = reinterpret_cast<float*>(base + lse_partial);
        params.out_partial = reinterpret_cast<float*>(base + out_partial);
        if (added != nullptr) {
          append({.zeroed = params.finished_parts, .zeroed_count = counters});
        } else if (counters > 0) {
          FLASH_ATTN_CUDA_CHECK(cudaMemsetAsync(params.finished_parts, 0, counters * sizeof(int), target.stream));
        }
        if (grid.items == 0) return;
        // Copies of unaligned rows, if there have to be any, have the new keys.
        const Operand aligned_q = with_aligned_rows(q);
        const Operand k = with_aligned_rows(cache.k), v = with_aligned_rows(cache.v);
        params.q = view_of(aligned_q), params.cache.k = view_of(k), params.cache.v = view_of(v);
        for_element(q, [&]<typename Element>(Element) {
          decode::launch_decode<Element, Config::kHeadDim>(params, grid.blocks, target);
        });
      });
  return {out, lse};
}

}  // namespace

Tensor append_kv(Tensor k_cache, Tensor v_cache, Tensor k, Tensor v, Tensor cache_seqlens, OptionalTensor q,
                 OptionalTensor rotary_cos, OptionalTensor rotary_sin, bool interleaved, bool q_per_position,
                 OptionalTensor block_table, OptionalTensor cache_batch_idx, OptionalTensor cu_seqlens_q,
                 OptionalTensor cu_seqlens_k_new) {
  const torch::stable::accelerator::DeviceGuard guard(k_cache.get_device_index());
  const CacheArguments cache(k_cache, v_cache, cache_seqlens, block_table, cache_batch_idx, {});
  const AppendedArguments added(k, v, cu_seqlens_k_new, rotary_cos, rotary_sin, interleaved, q_per_position, cache);
  std::optional<Operand> dense_q;
  if (q.has_value()) dense_q = with_dense_rows("q", *q, cu_seqlens_q.has_value() ? 3 : 4, cache.k);
  const std::optional<Operand> rotated =
      run_append(cache, added, dense_q, CacheArguments::contiguous(cu_seqlens_q), {}, launch_target(cache.k));
  return rotated.has_value() ? Tensor(*rotated) : new_tensor(k_cache, {0}, k_cache.scalar_type());
}

std::tuple<Tensor, Tensor> decode_cache(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens,
                                        double softmax_scale, int64_t window_left, int64_t window_right, double softcap,
                                        int64_t num_splits, bool batch_invariant, OptionalTensor block_table,
                                        OptionalTensor cache_batch_idx, OptionalTensor cu_seqlens_q,
                                        OptionalTensor cache_leftpad, OptionalTensor alibi_slopes,
                                        OptionalTensor learnable_sink) {
  const torch::stable::accelerator::DeviceGuard guard(k_cache.get_device_index());
  const CacheArguments cache(k_cache, v_cache, cache_seqlens, block_table, cache_batch_idx, cache_leftpad);
  return run_decode(q, cache, nullptr,
                    {softmax_scale, window_left, window_right, softcap, num_splits, batch_invariant,
                     CacheArguments::contiguous(cu_seqlens_q), alibi_slopes, learnable_sink});
}

std::tuple<Tensor, Tensor> append_and_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor k,
                                             Tensor v, double softmax_scale, int64_t window_left, int64_t window_right,
                                             double softcap, int64_t num_splits, bool batch_invariant,
                                             OptionalTensor rotary_cos, OptionalTensor rotary_sin, bool interleaved,
                                             OptionalTensor block_table, OptionalTensor cache_batch_idx,
                                             OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k_new,
                                             OptionalTensor cache_leftpad, OptionalTensor alibi_slopes,
                                             OptionalTensor learnable_sink) {
  const torch::stable::accelerator::DeviceGuard guard(k_cache.get_device_index());
  const CacheArguments cache(k_cache, v_cache, cache_seqlens, block_table, cache_batch_idx, cache_leftpad);
  const bool q_per_position = window_left >= 0 || window_right >= 0;
  const AppendedArguments added(k, v, cu_seqlens_k_new, rotary_cos, rotary_sin, interleaved, q_per_position, cache);
  return run_decode(q, cache, &added,
                    {softmax_scale, window_left, window_right, softcap, num_splits, batch_invariant,
                     CacheArguments::contiguous(cu_seqlens_q), alibi_slopes, learnable_sink});
}

STABLE_TORCH_LIBRARY_IMPL(flash_attn_kernels, CUDA, m) {
  m.impl("append_kv", TORCH_BOX(&append_kv));
  m.impl("decode", TORCH_BOX(&decode_cache));
  m.impl("append_and_decode", TORCH_BOX(&append_and_decode));
}

}  // namespace flash_attn::api
