// The arguments that the operators of every feature have in common, once in each form that they take: text of the
// schema, parameters of the C++ function, initialisers of AttentionArguments. The order is the same in all.
//
// Options come first; what may be absent comes last and has a default. A plain call then passes few arguments, and each
// one that crosses the boxed interface costs time.
#pragma once

#define FLASH_ATTN_SCHEMA_OPTIONS "float softmax_scale, int window_left, int window_right, bool top_left"
#define FLASH_ATTN_SCHEMA_OPTIONAL                                                                                 \
  "float softcap=0., float dropout_p=0., Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None,"                    \
  "Tensor? seqused_q=None, Tensor? seqused_k=None, Tensor? block_table=None, Tensor? attn_bias=None,"              \
  "Tensor? attn_mask=None, Tensor? key_padding_mask=None, Tensor? alibi_slopes=None, Tensor? learnable_sink=None," \
  "Tensor? seed_and_offset=None"

// Of a backward, with its results.
#define FLASH_ATTN_SCHEMA_BACKWARD                                                  \
  "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, bool "        \
  "deterministic," FLASH_ATTN_SCHEMA_OPTIONS "," FLASH_ATTN_SCHEMA_OPTIONAL         \
  ", Tensor? dlse=None, bool needs_attn_bias=False, bool needs_alibi_slopes=False," \
  " bool needs_learnable_sink=False, bool one_gradient=False)"                      \
  " -> (Tensor, Tensor, Tensor, Tensor?, Tensor?, Tensor?)"

#define FLASH_ATTN_SCHEMA_DENSE "Tensor q, Tensor k, Tensor v, float softmax_scale, bool causal"

#define FLASH_ATTN_PARAMETERS                                                                                       \
  double softmax_scale, int64_t window_left, int64_t window_right, bool top_left, double softcap, double dropout_p, \
      std::optional<Tensor> cu_seqlens_q, std::optional<Tensor> cu_seqlens_k, std::optional<Tensor> seqused_q,      \
      std::optional<Tensor> seqused_k, std::optional<Tensor> block_table, std::optional<Tensor> attn_bias,          \
      std::optional<Tensor> attn_mask, std::optional<Tensor> key_padding_mask, std::optional<Tensor> alibi_slopes,  \
      std::optional<Tensor> learnable_sink, std::optional<Tensor> seed_and_offset

#define FLASH_ATTN_ARGUMENTS                                                                                     \
  softmax_scale, window_left, window_right, top_left, softcap, dropout_p, cu_seqlens_q, cu_seqlens_k, seqused_q, \
      seqused_k, block_table, attn_bias, attn_mask, key_padding_mask, alibi_slopes, learnable_sink, seed_and_offset

// Of the operators on a key-value cache.
#define FLASH_ATTN_SCHEMA_CACHE_OPTIONS                                                         \
  "float softmax_scale, int window_left, int window_right, float softcap=0., int num_splits=0," \
  "bool batch_invariant=False"
#define FLASH_ATTN_SCHEMA_CACHE_LAYOUT \
  "Tensor? block_table=None, Tensor? cache_batch_idx=None, Tensor? cu_seqlens_q=None"
#define FLASH_ATTN_SCHEMA_CACHE_MODIFIERS \
  "Tensor? cache_leftpad=None, Tensor? alibi_slopes=None, Tensor? learnable_sink=None"
