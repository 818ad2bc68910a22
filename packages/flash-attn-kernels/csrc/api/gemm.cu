// Operators of matrix products with epilogues.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <climits>
#include <optional>
#include <tuple>
#include <utility>

#include "../gemm/cublaslt_library.h"
#include "../gemm/matmul.h"
#include "allocate.h"
#include "device.h"

namespace flash_attn::api {

namespace {

using gemm::LtEpilogue;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kHopperWorkspaceBytes = int64_t{32} << 20, kWorkspaceBytes = int64_t{8} << 20;

struct Traits {
  bool takes_bias = false, writes_aux = false, reads_aux = false, is_mask = false;
  bool sums_out = false;  // over its rows
  bool sums_a = false;    // over its columns
};

Traits traits_of(LtEpilogue epilogue) {
  switch (epilogue) {
    case gemm::kLtDefault:
      return {};
    case gemm::kLtBias:
    case gemm::kLtReluBias:
    case gemm::kLtGeluBias:
      return {.takes_bias = true};
    case gemm::kLtReluAuxBias:
      return {.takes_bias = true, .writes_aux = true, .is_mask = true};
    case gemm::kLtGeluAuxBias:
      return {.takes_bias = true, .writes_aux = true};
    case gemm::kLtReluGradient:
      return {.reads_aux = true, .is_mask = true};
    case gemm::kLtReluBiasGradient:
      return {.reads_aux = true, .is_mask = true, .sums_out = true};
    case gemm::kLtGeluGradient:
      return {.reads_aux = true};
    case gemm::kLtGeluBiasGradient:
      return {.reads_aux = true, .sums_out = true};
    case gemm::kLtBiasGradientB:
      return {.sums_a = true};
  }
  STD_TORCH_CHECK(false, "epilogue: got ", static_cast<uint32_t>(epilogue), ", which is none of gemm.Epilogue");
}

// As it is where rows or columns are contiguous and 16-byte aligned to each other; otherwise a contiguous copy, which
// `copy` keeps alive.
gemm::Matrix matrix_of(const Tensor& x, OptionalTensor& copy) {
  const int64_t rows = x.size(0), columns = x.size(1), row = x.stride(0), column = x.stride(1);
  const bool aligned = reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
  const auto is_leading = [](int64_t stride, int64_t least) { return stride >= least && stride % 8 == 0; };
  if (aligned && column == 1 && is_leading(row, columns)) return {x.data_ptr(), rows, columns, row, false};
  if (aligned && row == 1 && is_leading(column, rows)) return {x.data_ptr(), rows, columns, column, true};
  copy = new_contiguous(x);
  torch::stable::copy_(*copy, x);
  return {copy->data_ptr(), rows, columns, columns, false};
}

void check_factors(const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(a.is_cuda() && b.is_cuda() && a.get_device_index() == b.get_device_index(),
                  "a, b: must be on one GPU");
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type() &&
                      (a.scalar_type() == ScalarType::Half || a.scalar_type() == ScalarType::BFloat16),
                  "a, b: must be float16 or bfloat16, both the same");
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0), "a, b: must be (M, K) and (K, N)");
  for (const int64_t size : {a.size(0), a.size(1), b.size(1)}) {
    STD_TORCH_CHECK(size > 0 && size < INT_MAX, "a, b: sizes must be in [1, 2^31)");
  }
}

// The product, its results allocated.
struct Call {
  gemm::Product product;
  Tensor out, extra;
  OptionalTensor a_copy, b_copy, aux_copy;
};

Call prepare(const Tensor& a, const Tensor& b, const OptionalTensor& bias, const OptionalTensor& aux,
             int64_t epilogue_number) {
  check_factors(a, b);
  const auto epilogue = static_cast<LtEpilogue>(epilogue_number);
  const Traits traits = traits_of(epilogue);
  const int64_t rows = a.size(0), columns = b.size(1), device = a.get_device_index();
  STD_TORCH_CHECK(columns % 8 == 0, "b: its columns must be a multiple of 8");
  STD_TORCH_CHECK(!traits.is_mask || columns % 128 == 0, "b: its columns must be a multiple of 128 for a bit mask");
  STD_TORCH_CHECK(bias.has_value() == traits.takes_bias && aux.has_value() == traits.reads_aux,
                  "bias, aux: must be given where the epilogue reads them, and nowhere else");
  const int64_t aux_columns = traits.is_mask ? columns / 8 : columns;
  const ScalarType aux_type = traits.is_mask ? ScalarType::Byte : a.scalar_type();

  Call call{.out = new_tensor(a, {rows, columns}, a.scalar_type()),
            .extra = traits.writes_aux ? new_tensor(a, {rows, aux_columns}, aux_type)
                                       : new_tensor(a,
                                                    {traits.sums_out ? columns
                                                     : traits.sums_a ? rows
                                                                     : 0},
                                                    a.scalar_type())};
  gemm::Product& product = call.product;
  product = {.a = matrix_of(a, call.a_copy),
             .b = matrix_of(b, call.b_copy),
             .out = {call.out.data_ptr(), rows, columns, columns, false},
             .type = a.scalar_type() == ScalarType::Half ? gemm::kLtHalf : gemm::kLtBFloat16,
             .epilogue = epilogue,
             .bias = nullptr,
             .aux = nullptr,
             .aux_leading = columns,
             .device = static_cast<int>(device),
             .max_workspace_bytes = device_limits(static_cast<int>(device)).capability_major >= 9
                                        ? kHopperWorkspaceBytes
                                        : kWorkspaceBytes};
  if (traits.takes_bias) {
    STD_TORCH_CHECK(bias->is_cuda() && bias->scalar_type() == a.scalar_type() && bias->dim() == 1 &&
                        bias->size(0) == columns && bias->is_contiguous(),
                    "bias: must be (N,), contiguous, of the dtype of a");
    product.bias = bias->data_ptr();
  }
  if (traits.sums_out || traits.sums_a) product.bias = call.extra.data_ptr();
  if (traits.writes_aux) product.aux = call.extra.data_ptr();
  if (traits.reads_aux) {
    STD_TORCH_CHECK(aux->is_cuda() && aux->scalar_type() == aux_type && aux->dim() == 2 && aux->size(0) == rows &&
                        aux->size(1) == aux_columns,
                    "aux: must be what the forward epilogue stored for this shape");
    if (!aux->is_contiguous()) {
      call.aux_copy = new_contiguous(*aux);
      torch::stable::copy_(*call.aux_copy, *aux);
    }
    product.aux = (call.aux_copy.has_value() ? *call.aux_copy : *aux).data_ptr();
  }
  return call;
}

}  // namespace

std::tuple<Tensor, Tensor> gemm_epilogue(Tensor a, Tensor b, OptionalTensor bias, OptionalTensor aux, int64_t epilogue,
                                         int64_t algorithm) {
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  Call call = prepare(a, b, bias, aux, epilogue);
  OptionalTensor workspace;  // a freed one is reused in stream order
  gemm::run(call.product, algorithm, current_stream(a), [&](int64_t bytes) {
    workspace = new_tensor(a, {bytes}, ScalarType::Byte);
    return workspace->data_ptr();
  });
  return {std::move(call.out), std::move(call.extra)};
}

int64_t gemm_candidates(Tensor a, Tensor b, OptionalTensor bias, OptionalTensor aux, int64_t epilogue) {
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  return gemm::candidate_count(prepare(a, b, bias, aux, epilogue).product);
}

int64_t gemm_cublaslt_version() {
  const gemm::LtFunctions* functions = gemm::find_cublaslt();
  return functions == nullptr ? 0 : static_cast<int64_t>(functions->version());
}

STABLE_TORCH_LIBRARY_IMPL(flash_attn_kernels, CUDA, m) {
  m.impl("gemm_epilogue", TORCH_BOX(&gemm_epilogue));
  m.impl("gemm_candidates", TORCH_BOX(&gemm_candidates));
}

STABLE_TORCH_LIBRARY_IMPL(flash_attn_kernels, CompositeImplicitAutograd, m) {
  m.impl("gemm_cublaslt_version", TORCH_BOX(&gemm_cublaslt_version));
}

}  // namespace flash_attn::api
