"""What is left to do after backward."""

from __future__ import annotations

from flash_attn_ops.distributed import allreduce_sequence_parallel_grad
from torch import nn

from flash_attn_models.errors import bad_argument
from flash_attn_models.tensor_parallel.plan import TensorParallel


def reduce_gradients(model: nn.Module) -> None:
    """Add up, over the ranks of a model with ``sequence_parallel``, gradients of what each applied to its own tokens:
    norms and embeddings of positions. After backward (the last one, if several add up) and before gradients are used.
    Other models have nothing to do here.

    Raises:
        ValueError: a module that is no model of this package; gradients that are missing.
    """
    parallel = getattr(model, "parallel", None)
    if not isinstance(parallel, TensorParallel):
        raise bad_argument(
            "model", f"a {type(model).__name__}", "a model of flash_attn_models", "unwrap it: model.module"
        )
    if parallel.is_parallel and parallel.sequence_parallel:
        allreduce_sequence_parallel_grad(model, parallel.group)
