// From the arguments of an attention operator to the parameters of its kernels.
//
// Users meet the checks of the Python functions; the ones here only keep a direct caller from a bad launch.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <climits>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <utility>

#include "../attention/head_dims.h"
#include "../attention/params.h"
#include "allocate.h"

namespace flash_attn::api {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What the operators have in common, in the order of operator_arguments.h.
struct AttentionArguments {
  double softmax_scale;
  int64_t window_left, window_right;
  bool top_left;
  double softcap = 0, dropout_p = 0;
  std::optional<Tensor> cu_seqlens_q{}, cu_seqlens_k{}, seqused_q{}, seqused_k{}, block_table{};
  std::optional<Tensor> attn_bias{}, attn_mask{}, key_padding_mask{}, alibi_slopes{}, learnable_sink{};
  std::optional<Tensor> seed_and_offset{};

  // Of the operators for dense calls, see library.cu.
  static AttentionArguments dense(double softmax_scale, bool causal) {
    return {.softmax_scale = softmax_scale, .window_left = -1, .window_right = causal ? 0 : -1, .top_left = false};
  }

  bool packed() const { return cu_seqlens_q.has_value(); }
  bool paged() const { return block_table.has_value(); }
};

// A tensor whose layout and address are read once. Each question to torch is a call into another library, and for every
// tensor whose rows the kernels move there are some twenty.
class Operand : public Tensor {
 public:
  explicit Operand(Tensor tensor) : Tensor(std::move(tensor)), data_(Tensor::data_ptr()), dim_(Tensor::dim()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(get(), &sizes_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(get(), &strides_));
  }
  void* data_ptr() const { return data_; }
  int64_t dim() const { return dim_; }
  int64_t size(int64_t d) const { return sizes_[d]; }
  int64_t stride(int64_t d) const { return strides_[d]; }

 private:
  void* data_;
  int64_t dim_;
  int64_t *sizes_ = nullptr, *strides_ = nullptr;
};

// The kernels take any strides but that of the last dimension.
inline Operand with_dense_rows(const char* name, const Tensor& given, int64_t dim, const Tensor& q) {
  Operand x(given);
  STD_TORCH_CHECK(x.dim() == dim, name, ": got ", x.dim(), " dimensions, expected ", dim);
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == q.get_device_index(), name, ": must be on the device of q");
  STD_TORCH_CHECK(x.scalar_type() == q.scalar_type(), name, ": must have the dtype of q");
  STD_TORCH_CHECK(x.size(dim - 3) <= kMaxSeqlen, name, ": seqlen must be at most ", kMaxSeqlen);
  if (x.stride(dim - 1) == 1 || x.size(dim - 1) == 1) return x;
  Tensor copy = new_contiguous(x);
  torch::stable::copy_(copy, x);
  return Operand(std::move(copy));
}

inline bool has_aligned_rows(const Operand& x) {
  const int64_t last = x.dim() - 1;
  if (reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 != 0 || x.size(last) % 8 != 0) return false;
  for (int64_t d = 0; d < last; ++d) {
    if (x.size(d) > 1 && x.stride(d) % 8 != 0) return false;
  }
  return true;
}

// (batch, row, head, dim), or packed (row, head, dim).
inline TensorView view_of(const Operand& x) {
  const int64_t row = x.dim() - 3;
  return {x.data_ptr(), row == 0 ? 0 : x.stride(0), x.stride(row), x.stride(row + 1)};
}

// Pages (page, row, head, dim): the page table finds the page.
inline TensorView page_view_of(const Operand& x) { return {x.data_ptr(), 0, x.stride(1), x.stride(2)}; }

inline const int* index_data(const char* name, const std::optional<Tensor>& x, int64_t size) {
  if (!x.has_value()) return nullptr;
  STD_TORCH_CHECK(
      x->is_cuda() && x->scalar_type() == ScalarType::Int && x->dim() == 1 && x->is_contiguous() && x->size(0) == size,
      name, ": must be contiguous int32 of ", size, " elements on the GPU");
  return static_cast<const int*>(x->data_ptr());
}

// Of a window; negative sizes are unbounded.
inline int window_side(int64_t size) {
  return size < 0 || size > Window::kUnbounded ? Window::kUnbounded : static_cast<int>(size);
}

// Null without slopes.
inline const float* alibi_slopes_data(const std::optional<Tensor>& slopes, const ProblemShape& shape,
                                      int64_t& batch_stride) {
  if (!slopes.has_value()) return nullptr;
  STD_TORCH_CHECK(slopes->is_cuda() && slopes->scalar_type() == ScalarType::Float && slopes->dim() == 2 &&
                      slopes->is_contiguous() && slopes->size(1) == shape.heads &&
                      (slopes->size(0) == 1 || slopes->size(0) == shape.batch),
                  "alibi_slopes: must be contiguous float32 (1 or batch, heads)");
  batch_stride = slopes->size(0) == 1 ? 0 : shape.heads;
  return static_cast<const float*>(slopes->data_ptr());
}

// Null without a sink.
inline const float* learnable_sink_data(const std::optional<Tensor>& sink, int64_t heads) {
  if (!sink.has_value()) return nullptr;
  STD_TORCH_CHECK(sink->is_cuda() && sink->scalar_type() == ScalarType::Float && sink->is_contiguous() &&
                      sink->dim() == 1 && sink->size(0) == heads,
                  "learnable_sink: must be contiguous float32 (heads)");
  return static_cast<const float*>(sink->data_ptr());
}

// A tensor broadcastable to (batch, heads, rows, columns) that has all four dimensions.
inline ScoreTensor score_tensor(const char* name, const Tensor& x, const ProblemShape& shape) {
  STD_TORCH_CHECK(x.is_cuda() && x.dim() == 4, name, ": must have four dimensions and be on the GPU");
  STD_TORCH_CHECK((x.size(0) == 1 || x.size(0) == shape.batch) && (x.size(1) == 1 || x.size(1) == shape.heads), name,
                  ": must be broadcastable to (batch, heads, seqlen_q, seqlen_k)");
  const auto stride = [&](int d) { return x.size(d) == 1 ? int64_t{0} : x.stride(d); };
  const auto extent = [&](int d) { return x.size(d) == 1 ? Window::kUnbounded : static_cast<int>(x.size(d)); };
  return {true, x.data_ptr(), stride(0), stride(1), stride(2), stride(3), extent(2), extent(3)};
}

// Whether a 16-bit tensor can be moved in whole chunks of 16 bytes.
inline bool has_aligned_chunks(const ScoreTensor& x) {
  return x.column_stride == 1 && x.columns % 8 == 0 && x.batch_stride % 8 == 0 && x.head_stride % 8 == 0 &&
         x.row_stride % 8 == 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

inline ModifierParams modifier_params(const AttentionArguments& arguments, const ProblemShape& shape, const Operand& k,
                                      const Operand& v) {
  ModifierParams params{};
  params.softcap = static_cast<float>(arguments.softcap);
  params.keep_scale = 1.f;
  params.alibi_slopes = alibi_slopes_data(arguments.alibi_slopes, shape, params.alibi_batch_stride);
  if (arguments.attn_bias.has_value()) {
    params.bias = score_tensor("attn_bias", *arguments.attn_bias, shape);
    const ScalarType type = arguments.attn_bias->scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16 || type == ScalarType::Float,
                    "attn_bias: must be float16, bfloat16 or float32");
    params.bias_type = type == ScalarType::Half       ? BiasType::kHalf
                       : type == ScalarType::BFloat16 ? BiasType::kBFloat16
                                                      : BiasType::kFloat;
    params.bias_is_staged = type != ScalarType::Float && has_aligned_chunks(params.bias);
  }
  if (arguments.attn_mask.has_value()) {
    STD_TORCH_CHECK(arguments.attn_mask->scalar_type() == ScalarType::Bool, "attn_mask: must be bool");
    params.mask = score_tensor("attn_mask", *arguments.attn_mask, shape);
  }
  if (arguments.key_padding_mask.has_value()) {
    const Tensor& mask = *arguments.key_padding_mask;
    STD_TORCH_CHECK(
        mask.is_cuda() && mask.scalar_type() == ScalarType::Bool && mask.dim() == 2 && mask.size(0) == shape.batch,
        "key_padding_mask: must be bool (batch, seqlen_k)");
    params.key_padding = {true, mask.data_ptr(), mask.stride(0),     0,
                          0,    mask.stride(1),  Window::kUnbounded, static_cast<int>(mask.size(1))};
  }
  if (arguments.seed_and_offset.has_value()) {
    const Tensor& seed = *arguments.seed_and_offset;
    STD_TORCH_CHECK(seed.is_cuda() && seed.scalar_type() == ScalarType::Long && seed.is_contiguous(),
                    "seed_and_offset: must be contiguous int64 on the GPU");
    STD_TORCH_CHECK(arguments.dropout_p >= 0 && arguments.dropout_p < 1, "dropout_p: must be in [0, 1)");
    params.seed_and_offset = static_cast<const int64_t*>(seed.data_ptr());
    // Rounded half to even, as in Python: every path draws the same mask.
    params.drop_threshold = static_cast<uint32_t>(std::min(std::nearbyint(arguments.dropout_p * 0x1p32), 0x1p32 - 1));
    params.keep_scale = static_cast<float>(1.0 / (1.0 - arguments.dropout_p));
  }
  if (arguments.paged()) {
    const Tensor& table = *arguments.block_table;
    STD_TORCH_CHECK(table.is_cuda() && table.scalar_type() == ScalarType::Int && table.dim() == 2 &&
                        table.size(0) == shape.batch && (table.stride(1) == 1 || table.size(1) <= 1),
                    "block_table: must be int32 (batch, pages) with contiguous rows");
    params.pages = {static_cast<const int*>(table.data_ptr()),
                    table.stride(0),
                    /*entries=*/nullptr,
                    static_cast<int>(table.size(0)),
                    static_cast<int>(k.size(1)),
                    static_cast<int>(k.size(0)),
                    k.stride(0),
                    v.stride(0)};
  }
  return params;
}

// Whether only the general kernels can run the call. Plain ones need a positive scale because they take the maximum of
// the raw products.
inline bool needs_general(const ModifierParams& params, float softmax_scale) {
  return !(softmax_scale > 0) || params.softcap > 0 || params.alibi_slopes != nullptr || params.bias.present ||
         params.mask.present || params.key_padding.present || params.seed_and_offset != nullptr ||
         !params.aligned_rows || params.pages.table != nullptr;
}

// `moved` are all tensors whose rows the kernels copy, q first.
inline AttentionParams attention_params(const AttentionArguments& arguments, const Operand& q, const Operand& k,
                                        const Operand& v, const Operand& out,
                                        std::initializer_list<const Operand*> moved) {
  const int64_t rows = arguments.packed() ? 0 : 1;
  STD_TORCH_CHECK(arguments.packed() == arguments.cu_seqlens_k.has_value(), "cu_seqlens: must be given for q and k");
  STD_TORCH_CHECK(!arguments.paged() || arguments.packed(), "block_table: needs cu_seqlens");
  const int64_t key_rows = arguments.paged() ? 1 : rows;
  const int64_t batch = arguments.packed() ? arguments.cu_seqlens_q->size(0) - 1 : q.size(0);
  STD_TORCH_CHECK(q.scalar_type() == ScalarType::Half || q.scalar_type() == ScalarType::BFloat16,
                  "q: must be float16 or bfloat16");
  const int64_t heads = q.size(rows + 1), kv_heads = k.size(key_rows + 1), head_dim = q.size(rows + 2);
  for (int64_t d = 0; d < key_rows + 2; ++d) STD_TORCH_CHECK(k.size(d) == v.size(d), "k, v: shapes must match");
  STD_TORCH_CHECK(k.size(key_rows + 2) == head_dim, "q, k: head dims must be equal");
  const int64_t head_dim_v = v.size(key_rows + 2);
  STD_TORCH_CHECK(head_dim >= 1 && head_dim <= kMaxHeadDim && head_dim_v >= 1 && head_dim_v <= kMaxHeadDim,
                  "q, v: head dims must be in [1, ", kMaxHeadDim, "]");
  STD_TORCH_CHECK(arguments.packed() || k.size(0) == batch, "q, k: batch sizes must be equal");
  STD_TORCH_CHECK(heads > 0 && kv_heads > 0 && heads % kv_heads == 0, "q: heads must be a multiple of the heads of k");
  STD_TORCH_CHECK(std::isfinite(arguments.softmax_scale), "softmax_scale: must be finite");
  STD_TORCH_CHECK(batch >= 0 && batch < INT_MAX && heads < INT_MAX, "q: batch and heads must be below 2^31");

  AttentionParams params{};
  params.shape = {static_cast<int>(batch), static_cast<int>(heads), static_cast<int>(heads / kv_heads),
                  static_cast<int>(head_dim), static_cast<int>(head_dim_v)};
  params.queries = {index_data("cu_seqlens_q", arguments.cu_seqlens_q, batch + 1),
                    index_data("seqused_q", arguments.seqused_q, batch), static_cast<int>(q.size(rows)), INT_MAX};
  params.keys = {index_data("cu_seqlens_k", arguments.cu_seqlens_k, batch + 1),
                 index_data("seqused_k", arguments.seqused_k, batch),
                 arguments.paged() ? INT_MAX : static_cast<int>(k.size(key_rows)),
                 arguments.paged()
                     ? static_cast<int>(std::min<int64_t>(arguments.block_table->size(1) * k.size(1), kMaxSeqlen))
                     : INT_MAX};
  params.window = {window_side(arguments.window_left), window_side(arguments.window_right), arguments.top_left};
  params.softmax_scale = static_cast<float>(arguments.softmax_scale);
  params.softmax_scale_log2 = static_cast<float>(arguments.softmax_scale * 1.4426950408889634);
  params.q = view_of(q);
  params.k = arguments.paged() ? page_view_of(k) : view_of(k);
  params.v = arguments.paged() ? page_view_of(v) : view_of(v);
  params.out = view_of(out);
  params.lse_batch_stride = arguments.packed() ? 0 : heads * q.size(rows);
  params.lse_head_stride = q.size(rows);
  params.learnable_sink = learnable_sink_data(arguments.learnable_sink, heads);
  params.modifiers = modifier_params(arguments, params.shape, k, v);
  params.modifiers.aligned_rows = true;
  for (const Operand* x : moved) params.modifiers.aligned_rows &= has_aligned_rows(*x);
  return params;
}

}  // namespace flash_attn::api
