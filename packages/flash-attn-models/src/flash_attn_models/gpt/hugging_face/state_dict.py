"""Hugging Face state dicts to ours and back: one declarative table per family, read in both directions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flash_attn_models.gpt.config import GPTConfig


@dataclass(frozen=True)
class Entry:
    """One of our parameters and the Hugging Face tensors that it is made of.

    ``theirs`` are concatenated along dimension 0 after each was transposed, if ``transposed`` says so.
    ``rows`` are their sizes along dimension 0, needed for more than one.
    """

    ours: str
    theirs: tuple[str, ...]
    rows: tuple[int, ...] = ()
    transposed: bool = False

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Our tensor from theirs."""
        if self.transposed:
            tensors = [tensor.t() for tensor in tensors]
        return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Their tensors from ours; the inverse of ``join``. Contiguous."""
        tensors = [tensor] if len(self.theirs) == 1 else list(tensor.split(list(self.rows)))
        return [(part.t() if self.transposed else part).contiguous() for part in tensors]

    def split_shapes(self, shape: Sequence[int]) -> list[tuple[int, ...]]:
        """The shapes of their tensors when ours has this shape."""
        first_sizes = self.rows if len(self.theirs) > 1 else (shape[0],)
        shapes = [(rows, *shape[1:]) for rows in first_sizes]
        return [part[::-1] if self.transposed else part for part in shapes]


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
    """

    entries: tuple[Entry, ...]
    base_prefix: str
    buffers: re.Pattern[str]
    tied_head: str | None
    embedding: str

    def is_headless(self, names: Sequence[str]) -> bool:
        """Whether these are the names that a model without a head has: none has the base prefix."""
        bare = {name.removeprefix(self.base_prefix) for entry in self.entries for name in entry.theirs}
        return not any(name.startswith(self.base_prefix) for name in names) and not bare.isdisjoint(names)


def from_hugging_face(state_dict: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Our state dict from a complete Hugging Face one (names with the base prefix)."""
    return {entry.ours: entry.join([state_dict[name] for name in entry.theirs]) for entry in layout.entries}


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
        Entry(
            f"transformer.layers.{layer}.{entry.ours}",
            tuple(f"{their_prefix}.{layer}.{name}" for name in entry.theirs),
            entry.rows,
            entry.transposed,
        )
        for layer in range(n_layer)
        for entry in per_layer
    ]


def make_layout(config: GPTConfig, entries: list[Entry], base_prefix: str, buffers: str) -> Layout:
    """The layout of these entries, the embedding first, and of an untied head if there is one."""
    if not config.tie_embeddings:
        entries = [*entries, Entry("lm_head.weight", ("lm_head.weight",))]
    return Layout(
        entries=tuple(entries),
        base_prefix=base_prefix,
        buffers=re.compile(buffers),
        tied_head="lm_head.weight" if config.tie_embeddings else None,
        embedding=entries[0].theirs[0],
    )
