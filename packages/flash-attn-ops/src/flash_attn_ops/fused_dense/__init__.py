"""Dense layers with bias, activation and all gradients fused: ``linear``, ``mlp``, ``gated_mlp``, and their modules.

    linear:     x weight' + bias
    mlp:        act(x weight1' + bias1) weight2' + bias2
    gated_mlp:  (act(gate) * value) weight2' + bias2,  [gate, value] = x weight1' + bias1   [Shazeer 2020,
                arXiv:2002.05202]

What surrounds the products costs at most one pass over memory in each direction: epilogues of cuBLASLt where those
are faster, kernels that take activation gradient and bias sums together where not. The same functions run on any
device and in any floating-point dtype. Under autocast all tensors are cast to its dtype, as for torch's own layers.
"""

from .functional import gated_mlp, linear, mlp
from .modules import FusedDense, FusedGatedMLP, FusedMLP

__all__ = ["FusedDense", "FusedGatedMLP", "FusedMLP", "gated_mlp", "linear", "mlp"]
