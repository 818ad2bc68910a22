// From the arguments of the operators on a key-value cache to the parameters of their kernels.
//
// Users meet the checks of the Python functions; the ones here only keep a direct caller from a bad launch.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <climits>
#include <optional>

#include "../attention/decode/params.h"
#include "attention_arguments.h"

namespace flash_attn::api {

using OptionalTensor = std::optional<Tensor>;

// The caches (entry or page, row, head, dim), and what says where in them the keys of a sequence are.
struct CacheArguments {
  Operand k, v;
  Tensor seqlens;
  OptionalTensor block_table, batch_idx, leftpad;

  CacheArguments(Tensor k_cache, Tensor v_cache, const Tensor& cache_seqlens, OptionalTensor block_table_,
                 const OptionalTensor& cache_batch_idx, const OptionalTensor& cache_leftpad)
      : k(std::move(k_cache)),
        v(std::move(v_cache)),
        seqlens(contiguous(cache_seqlens)),
        block_table(std::move(block_table_)),
        batch_idx(contiguous(cache_batch_idx)),
        leftpad(contiguous(cache_leftpad)) {
    const bool is_16_bit = k.scalar_type() == ScalarType::Half || k.scalar_type() == ScalarType::BFloat16;
    STD_TORCH_CHECK(
        k.is_cuda() && is_16_bit && k.dim() == 4 && k.stride(3) == 1,
        "k_cache: must be float16 or bfloat16 (entries or pages, rows, heads, dim) on the GPU, contiguous in"
        " the last");
    STD_TORCH_CHECK(v.is_cuda() && v.scalar_type() == k.scalar_type() && v.dim() == 4 && v.stride(3) == 1,
                    "v_cache: must be like k_cache");
    for (int64_t d = 0; d < 3; ++d) STD_TORCH_CHECK(k.size(d) == v.size(d), "k_cache, v_cache: sizes differ");
    STD_TORCH_CHECK(k.size(1) <= kMaxSeqlen, "k_cache: an entry or page must have at most ", kMaxSeqlen, " rows");
    if (block_table.has_value()) {
      STD_TORCH_CHECK(
          block_table->is_cuda() && block_table->scalar_type() == ScalarType::Int && block_table->dim() == 2,
          "block_table: must be int32 (entries, pages) on the GPU");
      if (block_table->size(1) > 1 && block_table->stride(1) != 1) block_table = contiguous(block_table);
    } else {
      STD_TORCH_CHECK(batch_idx.has_value() || k.size(0) >= batch(), "k_cache: must have an entry for each sequence");
    }
  }

  int64_t batch() const { return seqlens.size(0); }

  decode::CacheLayout layout() const {
    decode::CacheLayout cache{};
    cache.k = view_of(k), cache.v = view_of(v);
    cache.lengths = index_data("cache_seqlens", seqlens, batch());
    cache.leftpad = index_data("cache_leftpad", leftpad, batch());
    cache.entries = index_data("cache_batch_idx", batch_idx, batch());
    cache.page_size = static_cast<int>(k.size(1));
    cache.capacity = cache.page_size;
    cache.pages = static_cast<int>(k.size(0));
    if (block_table.has_value()) {
      cache.page_table = static_cast<const int*>(block_table->data_ptr());
      cache.page_table_stride = block_table->stride(0);
      cache.page_entries = static_cast<int>(block_table->size(0));
      cache.capacity = static_cast<int>(std::min<int64_t>(block_table->size(1) * k.size(1), kMaxSeqlen));
    }
    return cache;
  }

  // torch::stable::contiguous is a call of the dispatcher also where there is nothing to do.
  static Tensor contiguous(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }
  static OptionalTensor contiguous(const OptionalTensor& x) {
    return x.has_value() ? OptionalTensor(contiguous(*x)) : x;
  }
};

// Rows of keys and values that are appended, (batch, rows, heads, dim) or packed, and how they and q are rotated.
struct AppendedArguments {
  Operand k, v;
  OptionalTensor cu_seqlens, cos, sin;
  bool interleaved, q_per_position;

  AppendedArguments(const Tensor& k_new, const Tensor& v_new, const OptionalTensor& cu_seqlens_k_new,
                    const OptionalTensor& rotary_cos, const OptionalTensor& rotary_sin, bool interleaved_,
                    bool q_per_position_, const CacheArguments& cache)
      : k(with_dense_rows("k", k_new, cu_seqlens_k_new.has_value() ? 3 : 4, cache.k)),
        v(with_dense_rows("v", v_new, cu_seqlens_k_new.has_value() ? 3 : 4, cache.k)),
        cu_seqlens(CacheArguments::contiguous(cu_seqlens_k_new)),
        cos(CacheArguments::contiguous(rotary_cos)),
        sin(CacheArguments::contiguous(rotary_sin)),
        interleaved(interleaved_),
        q_per_position(q_per_position_) {
    const int64_t last = k.dim() - 1;
    STD_TORCH_CHECK(k.size(last) == cache.k.size(3) && v.size(last) == cache.v.size(3) &&
                        k.size(last - 1) == cache.k.size(2) && v.size(last - 1) == cache.k.size(2) &&
                        k.size(last - 2) == v.size(last - 2),
                    "k, v: heads and head dims must be those of the cache, and rows equal");
    STD_TORCH_CHECK(last == 2 || (k.size(0) == cache.batch() && v.size(0) == cache.batch()),
                    "k, v: batch must be that of cache_seqlens");
    STD_TORCH_CHECK(cos.has_value() == sin.has_value(), "rotary_cos, rotary_sin: must be given together");
    if (!rotates()) return;
    STD_TORCH_CHECK(cos->is_cuda() && sin->is_cuda() && cos->dim() == 2 && sin->dim() == 2 &&
                        sin->scalar_type() == cos->scalar_type() && sin->size(0) == cos->size(0) &&
                        sin->size(1) == cos->size(1) && cos->size(0) > 0 && 2 * cos->size(1) <= k.size(last),
                    "rotary_cos, rotary_sin: must be (rows, rotary dim / 2) of one dtype on the GPU");
  }

  bool rotates() const { return cos.has_value(); }
};

// Rows of (batch, rows, ...) or packed (rows, ...) tensors.
inline RowLayout row_layout(const char* name, const OptionalTensor& cu_seqlens, const Operand& x, int64_t batch) {
  return {index_data(name, cu_seqlens, batch + 1), nullptr, static_cast<int>(x.size(x.dim() - 3)), INT_MAX};
}

}  // namespace flash_attn::api
