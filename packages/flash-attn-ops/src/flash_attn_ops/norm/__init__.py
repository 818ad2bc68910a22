"""LayerNorm and RMSNorm, with what precedes them in a transformer block, in one pass over memory.

For every row of N values, with r = dropout(x * rowscale * layerscale) + dropout(x1) + residual (of which every part
but x is optional) in the dtype it is returned in:

    layer_norm:  out = (r - mean(r)) / sqrt(var(r) + eps) * weight + bias
    rms_norm:    out = r / sqrt(mean(r^2) + eps) * weight + bias

[LayerNorm: Ba et al. 2016, arXiv:1607.06450; RMSNorm: Zhang & Sennrich 2019, arXiv:1910.07467.] Statistics
and gradients of vectors are accumulated in float32. Autocast changes nothing: the arithmetic is float32
whatever the inputs, and the output has x's dtype.

``layer_norm_linear`` and ``rms_norm_linear`` are followed by a linear layer, and do not keep what is between. The
submodule ``dropout_add`` has the older names of these operations.
"""

from .functions import layer_norm, rms_norm
from .linear import layer_norm_linear, rms_norm_linear
from .modules import LayerNorm, RMSNorm

__all__ = ["LayerNorm", "RMSNorm", "layer_norm", "layer_norm_linear", "rms_norm", "rms_norm_linear"]
