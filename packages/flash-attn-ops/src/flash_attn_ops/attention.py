"""Exact attention, from the kernels layer: what model code imports."""

from flash_attn_kernels import Explanation, explain, flash_attn_func, flash_attn_varlen_func

__all__ = ["Explanation", "explain", "flash_attn_func", "flash_attn_varlen_func"]
