"""Exact attention: CUDA kernels for NVIDIA GPUs, and the same functions on any other device."""

from .attention import explain, flash_attn_func, flash_attn_varlen_func
from .dispatch import Explanation

__version__ = "0.1.0"
__all__ = ["Explanation", "explain", "flash_attn_func", "flash_attn_varlen_func"]
