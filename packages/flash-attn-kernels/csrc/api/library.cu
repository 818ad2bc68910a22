// Schemas of the operators in torch.ops.flash_attn_kernels. Fakes and autograd are registered in Python.

#include <torch/csrc/stable/library.h>

#include "operator_arguments.h"

STABLE_TORCH_LIBRARY(flash_attn_kernels, m) {
  // window_left and window_right: -1 is unbounded. lse is fp32 (B, H, Sq) or (H, Tq), natural logarithm.
  m.def("sm80_forward(Tensor q, Tensor k, Tensor v," FLASH_ATTN_SCHEMA_OPTIONS "," FLASH_ATTN_SCHEMA_OPTIONAL
        ") -> (Tensor, Tensor)");
  // The same for what most calls are: dense, with all keys visible or the causal mask aligned at the bottom right, and
  // nothing else. Every argument costs time, some 0.25 us for a number, a third of it for what is left out.
  m.def("sm80_forward_dense(" FLASH_ATTN_SCHEMA_DENSE ") -> (Tensor, Tensor)");
  // Gradients of q, k, v, and of attn_bias, alibi_slopes (B, H) and learnable_sink (B, H) where they are needed. With
  // one_gradient the first is that of a tensor with the heads of q, k and v, and the next two have no elements.
  m.def("sm80_backward(" FLASH_ATTN_SCHEMA_BACKWARD);
  // The forward on a device of compute capability 9.x. Rows that are not 16-byte aligned go to the sm80 kernels.
  m.def("sm90_forward(Tensor q, Tensor k, Tensor v," FLASH_ATTN_SCHEMA_OPTIONS
        ", float softcap=0., Tensor? learnable_sink=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None,"
        " Tensor? seqused_q=None, Tensor? seqused_k=None) -> (Tensor, Tensor)");
  m.def("sm90_forward_dense(" FLASH_ATTN_SCHEMA_DENSE ") -> (Tensor, Tensor)");
  // Takes every call that sm80_backward takes: what the sm90 kernels cannot run goes to those of sm80.
  m.def("sm90_backward(" FLASH_ATTN_SCHEMA_BACKWARD);
  // Writes k and v, (B, rows, Hk, D) or packed, behind the first cache_seqlens[b] keys of the caches, and returns q
  // rotated if it is given, otherwise a tensor without elements. Rows that the cache has no room for are dropped.
  m.def(
      "append_kv(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor cache_seqlens, Tensor? q=None,"
      " Tensor? rotary_cos=None, Tensor? rotary_sin=None, bool interleaved=True, bool q_per_position=True,"
      " Tensor? block_table=None, Tensor? cache_batch_idx=None, Tensor? cu_seqlens_q=None,"
      " Tensor? cu_seqlens_k_new=None) -> Tensor");
  // Attention to a cache. num_splits: parts that the keys of a sequence are cut into, 0 is chosen.
  m.def("decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens," FLASH_ATTN_SCHEMA_CACHE_OPTIONS
        "," FLASH_ATTN_SCHEMA_CACHE_LAYOUT "," FLASH_ATTN_SCHEMA_CACHE_MODIFIERS ") -> (Tensor, Tensor)");
  // Both in one call. cache_seqlens are the lengths before. Where all queries see the same keys, all are rotated as the
  // first one.
  m.def(
      "append_and_decode(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_seqlens, Tensor k,"
      " Tensor v," FLASH_ATTN_SCHEMA_CACHE_OPTIONS
      ", Tensor? rotary_cos=None, Tensor? rotary_sin=None, bool interleaved=True," FLASH_ATTN_SCHEMA_CACHE_LAYOUT
      ", Tensor? cu_seqlens_k_new=None," FLASH_ATTN_SCHEMA_CACHE_MODIFIERS ") -> (Tensor, Tensor)");
  // Matrix products with an epilogue of cuBLASLt, numbered as there (flash_attn_kernels.gemm has the names): (a b, what
  // else the epilogue stores). algorithm: the candidate to take, or -1 for the fastest of them by a timing.
  m.def(
      "gemm_epilogue(Tensor a, Tensor b, Tensor? bias, Tensor? aux, int epilogue, int algorithm) -> (Tensor, Tensor)");
  m.def("gemm_candidates(Tensor a, Tensor b, Tensor? bias, Tensor? aux, int epilogue) -> int");
  m.def("gemm_cublaslt_version() -> int");  // 0 where there is none
  // The tile that a device granting a block `shared_bytes` gets: (rows, columns, warps, bytes of shared memory).
  m.def("sm80_forward_tile(int head_dim, int head_dim_v, bool general, int shared_bytes) -> (int, int, int, int)");
  m.def(
      "sm80_backward_tile(int head_dim, int head_dim_v, bool general, bool large_tiles, int shared_bytes)"
      " -> (int, int, int, int)");
}
