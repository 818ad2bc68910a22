"""Exact attention, from the kernels layer: what model code imports."""

from flash_attn_kernels import (
    Explanation,
    explain,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    index_first_axis,
    index_first_axis_residual,
    index_put_first_axis,
    merge_attention_states,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)

__all__ = [
    "Explanation",
    "explain",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "merge_attention_states",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]
