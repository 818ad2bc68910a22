// Schemas of the operators in torch.ops.flash_attn_kernels. Fakes and autograd are registered in Python.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(flash_attn_kernels, m) {
  // window_left and window_right: -1 is unbounded. lse is fp32 (B, H, Sq), natural logarithm.
  m.def(
      "sm80_forward(Tensor q, Tensor k, Tensor v, float softmax_scale, int window_left, int window_right)"
      " -> (Tensor, Tensor)");
  m.def(
      "sm80_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dlse,"
      " float softmax_scale, int window_left, int window_right, bool deterministic)"
      " -> (Tensor, Tensor, Tensor)");
}
