// Schemas of the operators in torch.ops.flash_attn_kernels. Fakes and autograd are registered in Python.

#include <torch/csrc/stable/library.h>

#include "operator_arguments.h"

STABLE_TORCH_LIBRARY(flash_attn_kernels, m) {
  // window_left and window_right: -1 is unbounded. lse is fp32 (B, H, Sq) or (H, Tq), natural logarithm.
  m.def("sm80_forward(Tensor q, Tensor k, Tensor v," FLASH_ATTN_SCHEMA_OPTIONS "," FLASH_ATTN_SCHEMA_OPTIONAL
        ") -> (Tensor, Tensor)");
  // The same without anything optional: every argument costs time, an absent one too, here a microsecond.
  m.def("sm80_forward_dense(Tensor q, Tensor k, Tensor v," FLASH_ATTN_SCHEMA_OPTIONS ") -> (Tensor, Tensor)");
  // Gradients of q, k, v, and of attn_bias, alibi_slopes (B, H) and learnable_sink (B, H) where they are needed.
  m.def(
      "sm80_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, bool "
      "deterministic," FLASH_ATTN_SCHEMA_OPTIONS "," FLASH_ATTN_SCHEMA_OPTIONAL
      ", Tensor? dlse=None, bool needs_attn_bias=False, bool needs_alibi_slopes=False,"
      " bool needs_learnable_sink=False) -> (Tensor, Tensor, Tensor, Tensor?, Tensor?, Tensor?)");
  // The forward on a device of compute capability 9.x. Rows that are not 16-byte aligned go to the sm80 kernels.
  m.def("sm90_forward(Tensor q, Tensor k, Tensor v," FLASH_ATTN_SCHEMA_OPTIONS
        ", float softcap=0., Tensor? learnable_sink=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None,"
        " Tensor? seqused_q=None, Tensor? seqused_k=None) -> (Tensor, Tensor)");
  // The tile that a device granting a block `shared_bytes` gets: (rows, columns, warps, bytes of shared memory).
  m.def("sm80_forward_tile(int head_dim, int head_dim_v, bool general, int shared_bytes) -> (int, int, int, int)");
  m.def(
      "sm80_backward_tile(int head_dim, int head_dim_v, bool general, bool large_tiles, int shared_bytes)"
      " -> (int, int, int, int)");
}
