"""From a model of one process to one that is spread over ranks, and what only one rank does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from flash_attn_ops.distributed import GroupLike

from flash_attn_models.tensor_parallel.plan import TensorParallel


def spread_model(model: Any, process_group: GroupLike, sequence_parallel: bool) -> Any:
    """The same GPT, BERT or ViT model, with the same heads, as this rank has it: on the meta device, weightless."""
    options: dict[str, Any] = {
        "device": "meta",
        "process_group": process_group,
        "sequence_parallel": sequence_parallel,
    }
    encoder = getattr(model, "bert", model)
    # Models whose pooler is not optional have no attribute of that name, or always the module.
    if hasattr(encoder, "pooler") and not hasattr(model, "seq_relationship"):
        options["with_pooler"] = encoder.pooler is not None
    return type(model)(model.config, **options)


def on_first_rank(parallel: TensorParallel, action: Callable[[], None]) -> None:
    """Do something on the first rank alone. All ranks call this and leave it together.

    Raises:
        The exception of the action, on the first rank; a ValueError with its message on the others.
    """
    if not parallel.is_parallel:
        action()
        return
    problem: Exception | None = None
    if parallel.group.rank == 0:
        try:
            action()
        except Exception as error:  # the other ranks wait to learn of it, whatever it is
            problem = error
    message = [None if problem is None else str(problem)]
    dist.broadcast_object_list(message, group_src=0, group=parallel.process_group)
    if problem is not None:
        raise problem
    if message[0] is not None:
        raise ValueError(message[0])
