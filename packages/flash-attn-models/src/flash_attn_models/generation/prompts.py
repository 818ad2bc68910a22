"""Prompts of different lengths: whatever side they are padded on, brought to one form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flash_attn_models.errors import bad_argument


@dataclass(frozen=True)
class Prompts:
    """Token ids, each row from its first token on.

    Attributes:
        tokens: (B,S), S the length of the longest prompt; a shorter one is followed by repetitions of its last token.
        seqlens: int32 (B,) on the device of the tokens, the length of each; None if all have S tokens.
        lengths: the same numbers on the host.
    """

    tokens: Tensor
    seqlens: Tensor | None
    lengths: tuple[int, ...]


def read_prompts(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    prompt_lengths: Tensor | Sequence[int] | None = None,
) -> Prompts:
    """Take the padding out of input_ids (B,S).

    Args:
        attention_mask: (B,S), bool or integers, 0 at padding: before or behind each prompt, not within.
        prompt_lengths: B integers: the first so many ids of each row are its prompt. At most one of both; None takes
            everything for a prompt.

    Raises:
        ValueError: wrong shapes or dtypes, padding within a prompt, or an empty prompt.
    """
    if not isinstance(input_ids, Tensor):
        raise bad_argument(
            "input_ids",
            f"a {type(input_ids).__name__}",
            "token ids of shape (batch, seqlen) in a tensor",
            "pass the tensor, as in tokenizer(text, return_tensors='pt').input_ids",
        )
    if input_ids.ndim != 2 or input_ids.numel() == 0 or input_ids.dtype not in (torch.int32, torch.int64):
        raise bad_argument(
            "input_ids",
            f"shape {tuple(input_ids.shape)}, {input_ids.dtype}",
            "token ids of shape (batch, seqlen) with at least one token each, int64 or int32",
            "add a batch dimension with input_ids[None], or start with the beginning-of-text token",
        )
    if attention_mask is not None and prompt_lengths is not None:
        raise bad_argument(
            "prompt_lengths", "lengths and an attention_mask", "one of both", "leave one of them out"
        )
    batch, seqlen = input_ids.shape
    if attention_mask is not None:
        starts, lengths = _from_mask(attention_mask, batch, seqlen)
    elif prompt_lengths is not None:
        starts, lengths = [0] * batch, _from_lengths(prompt_lengths, batch, seqlen)
    else:
        starts, lengths = [0] * batch, [seqlen] * batch
    longest = max(lengths)
    if min(lengths) == seqlen:
        return Prompts(input_ids.long(), None, tuple(lengths))
    first = torch.tensor(starts, device=input_ids.device)
    counts = torch.tensor(lengths, dtype=torch.int32, device=input_ids.device)
    index = torch.arange(longest, device=input_ids.device).minimum(counts[:, None] - 1) + first[:, None]
    seqlens = None if min(lengths) == longest else counts
    return Prompts(input_ids.long().gather(1, index), seqlens, tuple(lengths))


def _from_mask(mask: Tensor, batch: int, seqlen: int) -> tuple[list[int], list[int]]:
    """Start and length of each row's run of ones."""
    is_tensor = isinstance(mask, Tensor)
    if not is_tensor or mask.shape != (batch, seqlen) or mask.is_floating_point() or mask.is_complex():
        raise bad_argument(
            "attention_mask",
            f"shape {tuple(mask.shape)}, {mask.dtype}" if is_tensor else f"a {type(mask).__name__}",
            f"the shape of input_ids, ({batch}, {seqlen}), bool or integers",
            "pass the mask that the tokenizer returns, without broadcasting it",
        )
    real = mask.cpu() != 0
    lengths: list[int] = real.sum(dim=1).tolist()
    starts: list[int] = real.int().argmax(dim=1).tolist()
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        if length == 0 or not real[row, start : start + length].all():
            raise bad_argument(
                "attention_mask",
                f"no token in row {row}" if length == 0 else f"padding between tokens of row {row}",
                "one run of tokens in each row, with padding before or behind it",
                "start an empty prompt with the beginning-of-text token"
                if length == 0
                else "pad each prompt on one side",
            )
    return starts, lengths


def _from_lengths(lengths: Tensor | Sequence[int], batch: int, seqlen: int) -> list[int]:
    given = torch.as_tensor(lengths, device="cpu")
    if given.shape != (batch,) or given.dtype not in (torch.int32, torch.int64):
        raise bad_argument(
            "prompt_lengths",
            f"shape {tuple(given.shape)}, {given.dtype}",
            f"one integer for each of the {batch} rows of input_ids",
            "pass how many tokens each prompt has",
        )
    counts: list[int] = given.tolist()
    for row, count in enumerate(counts):
        if not 1 <= count <= seqlen:
            raise bad_argument(
                "prompt_lengths",
                f"{count} for row {row}",
                f"between 1 and the {seqlen} columns of input_ids",
                "pass lengths without padding, and pad input_ids behind the prompts",
            )
    return counts
