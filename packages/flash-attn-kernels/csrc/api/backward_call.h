// What the backward operators share: attention_sm80.cu makes results and scratch, attention_sm90.cu knows its kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../attention/params.h"

namespace flash_attn::api {

struct BackwardTile {
  int rows, columns;
  int head_dim;  // that the kernel computes with
};

// Of the sm90 kernels, if the device and the call allow them: the caller then runs them.
std::optional<BackwardTile> sm90_backward_tile(const BackwardParams& params, bool deterministic,
                                               const torch::stable::Tensor& q);

// q says dtype and device, which must be the current one. work_counter: a zeroed int on the device.
void run_sm90_backward(const BackwardParams& params, int* work_counter, const torch::stable::Tensor& q);

}  // namespace flash_attn::api
