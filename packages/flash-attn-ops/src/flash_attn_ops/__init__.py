"""What stands around attention in transformers: kernels, each with a readable reference beside it.

``flash_attn_ops.attention``, ``.norm``, ``.rotary``, ``.cross_entropy``, ``.linear_cross_entropy``, ``.activations``,
``.fused_dense``, ``.tensor_parallel``, ``.distributed``, ``.patch_embed``, ``.padding``: import from the family you
need. Importing needs no GPU and no Triton; kernels are loaded when a CUDA tensor first reaches them.
"""

__version__ = "0.1.0"
