"""Hugging Face state dicts to ours and back: one declarative table per family, read in both directions."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from flash_attn_models.gpt.config import GPTConfig


@dataclass(frozen=True)
class Interleaved:
    """A packed query/key/value projection whose rows are grouped by key/value head.

    ``groups`` is the number of key/value heads, ``ratio`` of query heads for each, ``d_head`` the rows of a head.
    """

    groups: int
    ratio: int
    d_head: int

    def separate(self, tensor: Tensor) -> Tensor:
        """(groups * (ratio + 2) * d_head, ...), a group after the other -> all queries, all keys, all values."""
        groups = tensor.unflatten(0, (self.groups, self.ratio + 2, self.d_head))
        q, k, v = groups.split([self.ratio, 1, 1], dim=1)
        return torch.cat([part.flatten(0, 2) for part in (q, k, v)])

    def mix(self, tensor: Tensor) -> Tensor:
        """The inverse of ``separate``."""
        rows = [self.groups * heads * self.d_head for heads in (self.ratio, 1, 1)]
        parts = [part.unflatten(0, (self.groups, -1, self.d_head)) for part in tensor.split(rows)]
        return torch.cat(parts, dim=1).flatten(0, 2)

    @classmethod
    def of(cls, config: GPTConfig) -> Interleaved:
        """The heads of a config."""
        return cls(config.num_heads_kv, config.n_head // config.num_heads_kv, config.head_dim)


@dataclass(frozen=True)
class Entry:
    """One of our parameters and the Hugging Face tensors that it is made of.

    ``theirs`` are concatenated along dimension 0 after each was transposed, if ``transposed`` says so.
    ``rows`` are their sizes along dimension 0, needed for more than one.
    ``interleaved`` says that theirs, one tensor, has the rows of each key/value head together, [q of its query heads |
    k | v], where ours has all queries before all keys before all values.
    ``paired_heads`` are, for each of theirs, the number of heads whose rows are the pairs of dimensions that rotate
    together, where ours have the first ones of all pairs before the second ones; 0 leaves the rows as they are.
    ``swap_halves`` says that the second half of the rows of theirs, one tensor, is the first one of ours.
    ``padding`` rows of theirs, one tensor, follow those that ours has; they are dropped, and zero on the way back.
    """

    ours: str
    theirs: tuple[str, ...]
    rows: tuple[int, ...] = ()
    transposed: bool = False
    interleaved: Interleaved | None = None
    paired_heads: tuple[int, ...] = ()
    swap_halves: bool = False
    padding: int = 0

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Our tensor from theirs."""
        if self.transposed:
            tensors = [tensor.t() for tensor in tensors]
        if self.interleaved is not None:
            return self.interleaved.separate(tensors[0])
        if self.paired_heads:
            tensors = [
                _rearrange_pairs(tensor, heads, (-1, 2)) if heads else tensor
                for tensor, heads in zip(tensors, self.paired_heads, strict=True)
            ]
        if self.swap_halves:
            return torch.cat(tensors[0].chunk(2)[::-1])
        if self.padding:
            return tensors[0][: -self.padding]
        return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Their tensors from ours; the inverse of ``join``. Contiguous."""
        if self.interleaved is not None:
            tensor = self.interleaved.mix(tensor)
        if self.swap_halves:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        if self.padding:
            tensor = torch.cat([tensor, tensor.new_zeros(self.padding, *tensor.shape[1:])])
        tensors = [tensor] if len(self.theirs) == 1 else list(tensor.split(list(self.rows)))
        if self.paired_heads:
            tensors = [
                _rearrange_pairs(part, heads, (2, -1)) if heads else part
                for part, heads in zip(tensors, self.paired_heads, strict=True)
            ]
        return [(part.t() if self.transposed else part).contiguous() for part in tensors]

    def split_shapes(self, shape: Sequence[int]) -> list[tuple[int, ...]]:
        """The shapes of their tensors when ours has this shape."""
        first_sizes = self.rows if len(self.theirs) > 1 else (shape[0] + self.padding,)
        shapes = [(rows, *shape[1:]) for rows in first_sizes]
        return [part[::-1] if self.transposed else part for part in shapes]


def _rearrange_pairs(tensor: Tensor, heads: int, rows_of_head: tuple[int, int]) -> Tensor:
    """Rows of each head: pairs to halves, for rows seen as (-1, 2), and halves to pairs, for (2, -1)."""
    return tensor.unflatten(0, (heads, *rows_of_head)).transpose(1, 2).flatten(0, 2)


@dataclass(frozen=True)
class Layout:
    """All tensors of a Hugging Face checkpoint.

    Attributes:
        entries: every parameter of the model, once.
        base_prefix: what the names of the headless model lack ("transformer." or "model."); files of such a
            model have the same names without it.
        buffers: matches names that older checkpoints carry and that hold no weights.
        tied_head: the output projection's name if it shares the embedding's weight and so has no entry of its
            own.
        embedding: the embedding's name.
        other_names: names that some files have instead, by the name of the entry.
    """

    entries: tuple[Entry, ...]
    base_prefix: str
    buffers: re.Pattern[str]
    tied_head: str | None
    embedding: str
    other_names: Mapping[str, str] = field(default_factory=dict)

    def name_in(self, names: Container[str], name: str) -> str:
        """The name that a tensor has among these names; ``name`` if it is missing."""
        other = self.other_names.get(name, name)
        return other if name not in names and other in names else name

    def is_headless(self, names: Sequence[str]) -> bool:
        """Whether these are the names that a model without a head has: none has the base prefix."""
        bare = {name.removeprefix(self.base_prefix) for entry in self.entries for name in entry.theirs}
        return not any(name.startswith(self.base_prefix) for name in names) and not bare.isdisjoint(names)


def from_hugging_face(state_dict: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Our state dict from a complete Hugging Face one (names with the base prefix)."""
    return {
        entry.ours: entry.join([state_dict[layout.name_in(state_dict, name)] for name in entry.theirs])
        for entry in layout.entries
    }


def to_hugging_face(state_dict: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The Hugging Face state dict of ours; the exact inverse of ``from_hugging_face``."""
    return {
        name: tensor
        for entry in layout.entries
        for name, tensor in zip(entry.theirs, entry.split(state_dict[entry.ours]), strict=True)
    }


def layer_entries(per_layer: Sequence[Entry], n_layer: int, their_prefix: str) -> list[Entry]:
    """The entries of one layer, repeated with full names for every layer."""
    return [
        replace(
            entry,
            ours=f"transformer.layers.{layer}.{entry.ours}",
            theirs=tuple(f"{their_prefix}.{layer}.{name}" for name in entry.theirs),
        )
        for layer in range(n_layer)
        for entry in per_layer
    ]


def linear_entries(
    ours: str, theirs: str | tuple[str, ...], bias: bool, *, transposed: bool = False, **options: Any
) -> list[Entry]:
    """The entries of the weight of a linear layer or a norm, and of its bias if it has one.

    Args:
        ours, theirs: names of the modules; several of theirs lie one below the other in ours.
        bias: whether there is one. It is a row, and so never transposed.
        transposed, options: fields of ``Entry``.
    """
    names = (theirs,) if isinstance(theirs, str) else theirs
    kinds = ("weight", "bias") if bias else ("weight",)
    return [
        Entry(
            f"{ours}.{kind}",
            tuple(f"{name}.{kind}" for name in names),
            transposed=transposed and kind == "weight",
            **options,
        )
        for kind in kinds
    ]


def make_layout(
    config: GPTConfig,
    entries: list[Entry],
    base_prefix: str,
    buffers: str,
    *,
    head: str = "lm_head",
    other_head: str | None = None,
    head_padding: int = 0,
) -> Layout:
    """The layout of these entries, the embedding first, and of a head's own parameters. The head has the name ``head``
    or, in other files, ``other_head``, if there is one; ``head_padding`` rows of theirs are no tokens."""
    if not config.tie_embeddings:
        entries = [*entries, *linear_entries("lm_head", head, config.head_bias, padding=head_padding)]
    elif config.head_bias:
        entries = [*entries, Entry("lm_head.bias", (f"{head}.bias",))]
    return Layout(
        entries=tuple(entries),
        base_prefix=base_prefix,
        buffers=re.compile(buffers),
        tied_head=f"{head}.weight" if config.tie_embeddings else None,
        embedding=entries[0].theirs[0],
        other_names={} if other_head is None else {f"{head}.weight": f"{other_head}.weight"},
    )
