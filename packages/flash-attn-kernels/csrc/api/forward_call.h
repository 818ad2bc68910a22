// What the forward operators do before they choose a kernel: results made, parameters filled in.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <utility>

#include "../attention/params.h"
#include "allocate.h"
#include "attention_arguments.h"

namespace flash_attn::api {

struct ForwardCall {
  Tensor q, k, v, out, lse;
  ForwardParams params;
};

// The device of q must be the current one.
inline ForwardCall forward_call(const AttentionArguments& arguments, const Tensor& q_given, const Tensor& k_given,
                                const Tensor& v_given) {
  const int64_t dim = arguments.packed() ? 3 : 4, key_dim = arguments.paged() ? 4 : dim;
  Operand q = with_dense_rows("q", q_given, dim, q_given);
  Operand k = with_dense_rows("k", k_given, key_dim, q), v = with_dense_rows("v", v_given, key_dim, q);
  const int64_t head_dim_v = v.size(key_dim - 1);
  Operand out(dim == 3 ? new_tensor(q, {q.size(0), q.size(1), head_dim_v}, q.scalar_type())
                       : new_tensor(q, {q.size(0), q.size(1), q.size(2), head_dim_v}, q.scalar_type()));
  Tensor lse = dim == 3 ? new_tensor(q, {q.size(1), q.size(0)}, ScalarType::Float)
                        : new_tensor(q, {q.size(0), q.size(2), q.size(1)}, ScalarType::Float);
  const ForwardParams params{attention_params(arguments, q, k, v, out, {&q, &k, &v, &out}),
                             static_cast<float*>(lse.data_ptr()), /*query_slots=*/0};
  return {std::move(q), std::move(k), std::move(v), std::move(out), std::move(lse), params};
}

// By the sm80 kernels, in attention_sm80.cu. q says dtype and device, which must be the current one.
void run_sm80_forward(const ForwardParams& params, const Tensor& q);

// By the sm90 kernels if the device and the call allow it, in attention_sm90.cu.
void run_forward(const ForwardParams& params, const Tensor& q);

}  // namespace flash_attn::api
