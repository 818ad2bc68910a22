// Tensors that an operator makes: results, and scratch in one piece.
//
// They come through torch's C interface directly, which is several times as fast as calling aten::new_empty by name.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace flash_attn::api {

constexpr int kMaxDims = 4;

// Uninitialised and contiguous, on the device of `like`.
template <typename Sizes>
torch::stable::Tensor new_tensor(const torch::stable::Tensor& like, const Sizes& sizes,
                                 torch::headeronly::ScalarType dtype) {
  int64_t dims[kMaxDims], strides[kMaxDims], dim = 0;
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(dim < kMaxDims, "got more than ", kMaxDims, " dimensions");
    dims[dim++] = size;
  }
  for (int64_t d = dim - 1, stride = 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= dims[d] > 0 ? dims[d] : 1;
  }
  AtenTensorHandle tensor = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, dims, strides, static_cast<int32_t>(dtype),
                                                  aoti_torch_device_type_cuda(), like.get_device_index(), &tensor));
  return torch::stable::Tensor(tensor);
}

inline torch::stable::Tensor new_tensor(const torch::stable::Tensor& like, std::initializer_list<int64_t> sizes,
                                        torch::headeronly::ScalarType dtype) {
  return new_tensor<std::initializer_list<int64_t>>(like, sizes, dtype);
}

inline torch::stable::Tensor new_contiguous(const torch::stable::Tensor& like) {
  return new_tensor(like, like.sizes(), like.scalar_type());
}

// Lays out arrays of 4-byte elements one after the other, each on a 256-byte boundary.
class ScratchLayout {
 public:
  int64_t bytes() const { return bytes_; }
  int64_t add(int64_t elements) {
    const int64_t offset = bytes_;
    bytes_ += (elements * 4 + 255) / 256 * 256;
    return offset;
  }

 private:
  int64_t bytes_ = 0;
};

}  // namespace flash_attn::api
