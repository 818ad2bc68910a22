"""What the optimizer should know of each parameter: its name, its kind, and whether it is decayed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from torch import nn

# What wrappers put into names: torch.compile, and activation checkpointing.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


class Kind(Enum):
    """What a parameter is for. Only matrices are decayed."""

    HIDDEN = "hidden matrix"  # both sides grow with the model's width
    MATRIX = "other matrix"  # input or output layers, convolutions
    EMBEDDING = "embedding"  # and heads tied to one, learned positions, class tokens
    VECTOR = "bias or norm"

    @property
    def is_decayed(self) -> bool:
        return self in (Kind.HIDDEN, Kind.MATRIX)


@dataclass(frozen=True)
class NamedParameter:
    """A parameter that is trained.

    Attributes:
        names: all its names, of which a shared one has several; without those of wrappers.
        parameter: itself.
        kind: see :class:`Kind`.
        is_decayed: as its kind says, unless the model says otherwise.
    """

    names: tuple[str, ...]
    parameter: nn.Parameter
    kind: Kind
    is_decayed: bool

    @property
    def name(self) -> str:
        return self.names[0]


def plain_name(name: str) -> str:
    """The name without what wrappers put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def named_parameters(model: nn.Module) -> list[NamedParameter]:
    """All parameters that are trained, each once, in the model's order.

    A parameter is a vector if it has fewer than two dimensions or is of a norm, whatever module holds it; an embedding
    if it is directly in a module whose class, or a base of it, is called ``...Embedding``, ``...Embeddings`` or
    ``...EmbeddingBag`` (torch's, ours, transformers'). A hidden matrix is one in a repeated layer (an
    ``nn.ModuleList``), or one that is square in the model's width.

    Models may exempt parameters from decay by name, as timm's do: a module's ``no_weight_decay``, a collection of names
    relative to the module or a method that returns one; or by ``parameter._no_weight_decay = True``.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(plain_name(name))
    embeddings, norms, repeated, exempt = set(), set(), set(), set()
    for prefix, module in model.named_modules():
        own = {id(parameter) for parameter in module.parameters(recurse=False)}
        if _is_called(module, ("Embedding", "Embeddings", "EmbeddingBag")):
            embeddings |= own
        elif _is_called(module, ("Norm", "Norm1d", "Norm2d", "Norm3d")):
            norms |= own
        if isinstance(module, nn.ModuleList):
            repeated |= {id(parameter) for parameter in module.parameters()}
        exempt |= {f"{plain_name(prefix + '.')}{name}".lstrip(".") for name in _undecayed_names(module)}
    width = width_of(model)

    def kind_of(parameter: nn.Parameter) -> Kind:
        if id(parameter) in embeddings:  # before vectors: an embedding of one value each is one too
            return Kind.EMBEDDING
        if parameter.ndim < 2 or id(parameter) in norms:
            return Kind.VECTOR
        if id(parameter) in repeated or tuple(parameter.shape) == (width, width):
            return Kind.HIDDEN
        return Kind.MATRIX

    return [
        NamedParameter(
            names=tuple(names[id(parameter)]),
            parameter=parameter,
            kind=kind_of(parameter),
            is_decayed=kind_of(parameter).is_decayed
            and not getattr(parameter, "_no_weight_decay", False)
            and exempt.isdisjoint(names[id(parameter)]),
        )
        for parameter in model.parameters()
        if parameter.requires_grad
    ]


def width_of(model: nn.Module) -> int | None:
    """Width of the residual stream by the model's config; None if it has none that says."""
    config = getattr(model, "config", None)
    for name in ("d_model", "hidden_size", "n_embd"):
        width = getattr(config, name, None)
        if isinstance(width, int):
            return width
    return None


def _is_called(module: nn.Module, endings: tuple[str, ...]) -> bool:
    # By name, since wrappers such as FSDP2 make classes of their own, and every library its own norms.
    return any(base.__name__.endswith(endings) for base in type(module).__mro__)


def _undecayed_names(module: nn.Module) -> Iterator[str]:
    names: Iterable[str] | None = getattr(module, "no_weight_decay", None)
    if callable(names):
        names = names()
    yield from names or ()
