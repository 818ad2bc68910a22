// Schemas of the operators in torch.ops.flash_attn_kernels. Fakes and autograd are registered in Python.

#include <torch/csrc/stable/library.h>

#define FLASH_ATTN_OPTIONAL_TENSORS                                                                        \
  "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k, Tensor? block_table," \
  "Tensor? attn_bias, Tensor? attn_mask, Tensor? key_padding_mask, Tensor? alibi_slopes,"                  \
  "Tensor? learnable_sink, Tensor? seed_and_offset,"
#define FLASH_ATTN_OPTIONS \
  "float softmax_scale, int window_left, int window_right, bool top_left, float softcap, float dropout_p"

STABLE_TORCH_LIBRARY(flash_attn_kernels, m) {
  // window_left and window_right: -1 is unbounded. lse is fp32 (B, H, Sq) or (H, Tq), natural logarithm.
  m.def("sm80_forward(Tensor q, Tensor k, Tensor v," FLASH_ATTN_OPTIONAL_TENSORS FLASH_ATTN_OPTIONS
        ") -> (Tensor, Tensor)");
  // The same without anything optional: an operator with few arguments is called faster.
  m.def(
      "sm80_forward_dense(Tensor q, Tensor k, Tensor v, float softmax_scale, int window_left, int window_right,"
      " bool top_left) -> (Tensor, Tensor)");
  m.def(
      "sm80_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? "
      "dlse," FLASH_ATTN_OPTIONAL_TENSORS FLASH_ATTN_OPTIONS
      ", bool deterministic, bool needs_attn_bias, bool needs_alibi_slopes, bool needs_learnable_sink)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // The tile that a device granting a block `shared_bytes` gets: (rows, columns, warps, bytes of shared memory).
  m.def("sm80_forward_tile(int head_dim, int head_dim_v, bool general, int shared_bytes) -> (int, int, int, int)");
  m.def(
      "sm80_backward_tile(int head_dim, int head_dim_v, bool general, bool large_tiles, int shared_bytes)"
      " -> (int, int, int, int)");
}
