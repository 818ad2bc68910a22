"""Between padded batches (B, S, ...) and packed tokens (T, ...). Everything is differentiable.

Names, arguments and results are those of FlashAttention-2.8's ``bert_padding``. Unlike there, indices may repeat
(their gradients add up), and tokens that both masks of :func:`unpad_input` name count once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional

from .errors import bad_argument


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Take the real tokens of a padded batch.

    Args:
        hidden_states: (B, S, ...).
        attention_mask: (B, S), bool or integer: 1 is a real token.
        unused_mask: (B, S), likewise: tokens to keep room for without using them. They must follow the real tokens of
            their row for ``seqused`` to describe them.

    Returns:
        the tokens (T, ...); their indices int64 (T,) into the flattened batch; cu_seqlens int32 (B + 1,); the longest
        length; seqused int32 (B,), the real tokens of each row. How many tokens there are decides shapes, so this
        synchronises with a GPU.

    Raises:
        ValueError: for masks whose shape is not (B, S), or on another device.
    """
    _check_mask("attention_mask", attention_mask, hidden_states)
    is_real = attention_mask != 0
    is_kept = is_real
    if unused_mask is not None:
        _check_mask("unused_mask", unused_mask, hidden_states)
        is_kept = is_real | (unused_mask != 0)
    indices = is_kept.flatten().nonzero().flatten()
    cu_seqlens, longest = _cumulative(is_kept.sum(dim=-1))
    seqused = is_real.sum(dim=-1, dtype=torch.int32)
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, longest, seqused


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Take the real tokens of a padded batch whose rows hold several sequences each, one after the other.

    Args:
        hidden_states: (B, S, ...).
        attention_mask_in_length: integer (B, S); each row lists the lengths of its sequences, then zeros. The row
            ``[2, 3, 0, 0, 0, 0]`` is a sequence of 2 tokens, one of 3, and one token of padding.

    Returns:
        the tokens (T, ...); their indices int64 (T,) into the flattened batch; cu_seqlens int32 with an entry for each
        sequence, and 0; the longest length. Synchronises with a GPU.

    Raises:
        ValueError: for lengths whose shape is not (B, S), below 0, or of more tokens than a row has.
    """
    _check_mask("attention_mask_in_length", attention_mask_in_length, hidden_states)
    tokens_of_row = attention_mask_in_length.sum(dim=-1, keepdim=True)
    positions = torch.arange(hidden_states.shape[1], device=attention_mask_in_length.device)
    indices = (positions < tokens_of_row).flatten().nonzero().flatten()
    lengths = attention_mask_in_length[attention_mask_in_length > 0]
    if not is_compiling() and (total := int(lengths.sum())) != indices.shape[0]:
        raise bad_argument(
            "attention_mask_in_length",
            f"sequences of {total} tokens for the {indices.shape[0]} that there are",
            f"lengths >= 0 that add up to at most {hidden_states.shape[1]} in each row",
            "list the lengths of the sequences in a row, then zeros",
        )
    cu_seqlens, longest = _cumulative(lengths)
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, longest


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Put tokens (T, ...) back to their ``indices`` int64 (T,) in a padded batch (batch, seqlen, ...) of zeros."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Rows ``input[indices]``: (N, ...) and int64 (T,) to (T, ...)."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Zeros of (first_axis_dim, ...) with ``values`` (T, ...) as rows ``indices``, int64 (T,), none of them twice."""
    return values.new_zeros((first_axis_dim, *values.shape[1:])).index_copy(0, indices, values)


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """(``input[indices]``, ``input``), for a layer that goes on with some rows and adds to all of them later."""
    return input.index_select(0, indices), input.view_as(input)


def _check_mask(name: str, mask: Tensor, hidden_states: Tensor) -> None:
    for argument, x in (("hidden_states", hidden_states), (name, mask)):
        if not isinstance(x, Tensor):
            raise bad_argument(
                argument, type(x).__name__, "a torch.Tensor", "convert it with torch.as_tensor"
            )
    if hidden_states.dim() < 2:
        raise bad_argument(
            "hidden_states",
            f"shape {tuple(hidden_states.shape)}",
            "shape (batch, seqlen, ...)",
            "pass a padded batch",
        )
    if mask.shape != hidden_states.shape[:2]:
        raise bad_argument(
            name,
            f"shape {tuple(mask.shape)}",
            f"(batch, seqlen) of hidden_states, {tuple(hidden_states.shape[:2])}",
            "pass one entry per token",
        )
    if mask.device != hidden_states.device:
        raise bad_argument(
            name,
            f"device {mask.device}",
            f"the device of hidden_states, {hidden_states.device}",
            "move it with .to",
        )


def _cumulative(lengths: Tensor) -> tuple[Tensor, int]:
    """cu_seqlens int32 (B + 1,) and the longest of the lengths (B,)."""
    # The 0 before them is the longest where there are no lengths.
    from_zero = functional.pad(lengths, (1, 0))
    return from_zero.cumsum(dim=0, dtype=torch.int32), int(from_zero.max())
