"""Packed tokens: sequences of different lengths, one after the other without padding.

Dimensions in comments: T packed tokens, B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from flash_attn_models.errors import bad_argument


@dataclass(frozen=True)
class Documents:
    """Where the sequences of packed tokens are; each has positions and attention of its own.

    Attributes:
        cu_seqlens: int32 (B+1,): sequence b is tokens ``cu_seqlens[b]`` up to, not including, ``cu_seqlens[b+1]``.
            Tokens behind the last one belong to none.
        max_seqlen: the longest sequence, or more.
        numbers: int64 (T,), the sequence of each token; B for those of none.
        positions: int64 (T,), the place of each token in its sequence; 0 for those of none.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    numbers: Tensor
    positions: Tensor

    @classmethod
    def of(cls, cu_seqlens: Tensor, max_seqlen: int | None, tokens: int, device: torch.device) -> Documents:
        """The sequences of so many tokens on a device.

        Args:
            cu_seqlens: int32 (B+1,).
            max_seqlen: the longest one; the numbers are trusted then. None reads and checks them, for which a GPU is
                waited for.

        Raises:
            ValueError: ``cu_seqlens`` of the wrong shape, dtype or device, or whose values are read and do not lead
                from 0 to ``tokens``.
        """
        max_seqlen = longest_sequence(cu_seqlens, max_seqlen, tokens, device)
        # Everything below has shapes known to the host, and waits for nothing.
        rows = torch.arange(tokens, device=device)
        # (Not among cu_seqlens[1:]: code that torch.compile makes for GPUs reads that from its beginning.)
        numbers = torch.searchsorted(cu_seqlens, rows, right=True) - 1
        positions = rows - cu_seqlens.index_select(0, numbers)
        positions = positions.masked_fill(numbers == cu_seqlens.shape[0] - 1, 0)
        return cls(cu_seqlens, max_seqlen, numbers, positions)


@dataclass(frozen=True)
class RealTokens:
    """The tokens of a padded batch that are no padding.

    Attributes:
        indices: int64 (T,), ascending places in the flattened batch.
        cu_seqlens: int32 (B+1,), where the tokens of each row begin among them, and T.
        max_seqlen: the most tokens of a row.
    """

    indices: Tensor
    cu_seqlens: Tensor
    max_seqlen: int


def real_tokens(is_real: Tensor) -> RealTokens | None:
    """Where a mask, bool (B,S), is True; None if it is everywhere. A GPU is waited for once."""
    lengths = is_real.sum(dim=1, dtype=torch.int32)
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    total, longest = torch.stack([cu_seqlens[-1], lengths.max()]).tolist()
    if total == is_real.numel():
        return None
    # The n-th real token is where the count of real tokens reaches n; unlike nonzero(), this knows how many there are.
    counts = is_real.flatten().cumsum(0)
    indices = torch.searchsorted(counts, torch.arange(1, total + 1, device=is_real.device))
    return RealTokens(indices, cu_seqlens, longest)


def longest_sequence(cu_seqlens: Tensor, max_seqlen: int | None, tokens: int, device: torch.device) -> int:
    """``max_seqlen``, or if that is None what ``cu_seqlens`` says once checked. See ``Documents.of``."""
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise bad_argument(
            "cu_seqlens",
            f"shape {tuple(cu_seqlens.shape)}, {cu_seqlens.dtype}",
            "int32 of shape (sequences + 1,)",
            "pass the cumulated lengths of the sequences, beginning with 0",
        )
    if cu_seqlens.device != device:
        raise bad_argument(
            "cu_seqlens",
            f"device {cu_seqlens.device}",
            f"the model's device {device}",
            f"use cu_seqlens.to({str(device)!r})",
        )
    if max_seqlen is not None:
        return max_seqlen
    lengths = cu_seqlens.diff()
    facts = torch.stack([cu_seqlens[0], cu_seqlens[-1], lengths.min(), lengths.max()]).tolist()
    first, last, shortest, longest = facts
    if first != 0 or last != tokens or shortest < 0:
        raise bad_argument(
            "cu_seqlens",
            f"a first value of {first}, a last of {last}, a shortest sequence of {shortest} tokens",
            f"ascending values from 0 to the {tokens} tokens of input_ids",
            "pass the cumulated lengths of the sequences in input_ids",
        )
    return longest
