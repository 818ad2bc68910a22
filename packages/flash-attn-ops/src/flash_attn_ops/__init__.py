"""Memory-bound operations of transformers, each with Triton kernels and a readable reference.

``flash_attn_ops.attention``, ``.norm``, ``.rotary``, ``.cross_entropy``: import from the family you need.
Importing needs no GPU and no Triton; kernels are loaded when a CUDA tensor first reaches them.
"""

__version__ = "0.1.0"
