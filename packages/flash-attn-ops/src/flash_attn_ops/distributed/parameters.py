"""Parameters that ranks hold alike: which they are, and what keeps them alike.

Marks are kept by modules, not by parameters: a parameter is replaced, and loses its attributes, when a module is
deep-copied or leaves the meta device.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from flash_attn_ops.arguments import bad_argument

from .group import GroupLike, resolve_group
from .pending import all_reduce_async

_SHARED = "_shared_parameter_names"
_SEQUENCE_PARALLEL = "_sequence_parallel_parameter_names"


def mark_shared(module: nn.Module, *names: str) -> None:
    """Say that these parameters of ``module`` (all, by default, those of its children included) have the same values on
    all ranks: :func:`sync_shared_params` makes it so."""
    _mark(module, names, _SHARED)


def mark_sequence_parallel(module: nn.Module, *names: str) -> None:
    """Say that these parameters of ``module`` (all, by default, those of its children included) are the same on all
    ranks, and that each rank applies them to its own tokens, as the norms between sequence-parallel layers: their
    gradients are sums over the ranks, which :func:`allreduce_sequence_parallel_grad` adds up."""
    _mark(module, names, _SEQUENCE_PARALLEL)


def shared_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that :func:`mark_shared` named, each once, in the order of ``model.named_parameters()``."""
    return _marked(model, _SHARED)


def sequence_parallel_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that :func:`mark_sequence_parallel` named, each once, in the order of
    ``model.named_parameters()``."""
    return _marked(model, _SEQUENCE_PARALLEL)


@torch.no_grad()
def sync_shared_params(model: nn.Module, group: GroupLike) -> None:
    """Give all ranks the values that the group's first rank has for the parameters marked as shared."""
    resolved = resolve_group(group)
    if resolved.size == 1:
        return
    for parameter in shared_parameters(model):
        # The functional broadcast counts its source within the group, and needs no ProcessGroup object.
        values = torch.ops._c10d_functional.broadcast(parameter.contiguous(), 0, resolved.name)
        parameter.copy_(torch.ops._c10d_functional.wait_tensor(values))


@torch.no_grad()
def allreduce_sequence_parallel_grad(model: nn.Module, group: GroupLike) -> None:
    """Add up, over the ranks, the gradients of the parameters marked as sequence-parallel: after backward, before
    the gradients are used. Gradients of one dtype travel in one message.

    Raises:
        ValueError: when some of these parameters that require a gradient have none, as the ranks' messages could then
            differ.
    """
    resolved = resolve_group(group)
    if resolved.size == 1:
        return
    gradients: list[Tensor] = []
    for parameter in sequence_parallel_parameters(model):
        if parameter.requires_grad:
            if parameter.grad is None:
                raise bad_argument(
                    "model",
                    "a sequence-parallel parameter without a gradient",
                    "gradients of all of them",
                    "call it after backward, and freeze parameters that are not used",
                )
            gradients.append(parameter.grad)
    by_kind = sorted(gradients, key=_kind)  # stable: the same order on all ranks
    for _, of_kind in itertools.groupby(by_kind, key=_kind):
        together = list(of_kind)
        flat = torch.cat([gradient.reshape(-1) for gradient in together])
        sums = all_reduce_async(flat, resolved, inplace=True).wait()
        pieces = sums.split([gradient.numel() for gradient in together])
        for gradient, piece in zip(together, pieces, strict=True):
            gradient.copy_(piece.view(gradient.shape))


def _kind(tensor: Tensor) -> tuple[str, str]:
    return str(tensor.device), str(tensor.dtype)


def _mark(module: nn.Module, names: tuple[str, ...], mark: str) -> None:
    known = dict(module.named_parameters())
    for name in names:
        if name not in known:
            raise bad_argument(
                "names", name, f"a parameter of {type(module).__name__}: {sorted(known)}", "name one of them"
            )
    setattr(module, mark, getattr(module, mark, frozenset()) | frozenset(names or known))


def _marked(model: nn.Module, mark: str) -> Iterator[nn.Parameter]:
    marked = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in getattr(module, mark, ())
    }
    # A tied parameter is marked if it is under any of its names.
    named = list(model.named_parameters(remove_duplicate=False))
    chosen = {id(parameter) for name, parameter in named if name in marked}
    return (parameter for parameter in model.parameters() if id(parameter) in chosen)
