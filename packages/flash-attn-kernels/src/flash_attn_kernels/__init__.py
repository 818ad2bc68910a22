"""Exact attention: CUDA kernels for NVIDIA GPUs, and the same functions on any other device."""

from .attention import flash_attn_func, flash_attn_varlen_func
from .combine import flash_attn_combine
from .dispatch import Explanation
from .explanation import explain, explain_kvcache
from .kvcache import append_kv, flash_attn_with_kvcache
from .merge import merge_attention_states
from .packed_tensors import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from .padding import (
    index_first_axis,
    index_first_axis_residual,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)

__version__ = "0.1.0"
__all__ = [
    "Explanation",
    "append_kv",
    "explain",
    "explain_kvcache",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "merge_attention_states",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]
