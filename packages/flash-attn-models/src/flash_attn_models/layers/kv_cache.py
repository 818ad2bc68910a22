"""Key/value caches: what attention needs of any, and the contiguous one, with a preallocated buffer per layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flash_attn_models.errors import bad_argument


class Cache:
    """Keys and values of the tokens seen so far, for sequences that may have different lengths.

    All layers of one forward pass write behind the same ``lengths``; the model then calls ``advance`` once. Meant for
    inference: there are no gradients.

    Args:
        k, v: by layer, (B,max_seqlen,Hk,D); or pages (num_pages,page_size,Hk,D), with a block_table.
        batch_size, max_seqlen: sequences, and how many tokens each has room for at most.
        block_table: int32 (B,max_pages): position t of sequence b is row ``t % page_size`` of page
            ``block_table[b, t // page_size]``. What belongs to a page -1 is not kept.

    Attributes:
        length: tokens of the longest sequence, or more. A number known to the host, so that room is checked without
            waiting for the device.
        lengths: int32 (B,) on the cache's device: tokens of each sequence. Positions from there on hold no data.
        equal_lengths: whether every sequence has ``length`` tokens.
        seqlens: in a forward pass whose rows have padding behind them, how many tokens of each are its own, (B,); None
            is all. The model sets it, ``advance`` forgets it.
        states: by layer, what it keeps of each sequence beside keys and values (depthwise convolutions do).
        rewindable: how many of a sequence's last tokens may be forgotten again; None is all. A layer that keeps a state
            sets it.
    """

    def __init__(
        self,
        k: list[Tensor],
        v: list[Tensor],
        batch_size: int,
        max_seqlen: int,
        block_table: Tensor | None = None,
    ) -> None:
        self.k = k
        self.v = v
        self.batch_size = batch_size
        self.max_seqlen = max_seqlen
        self.block_table = block_table
        self.length = 0
        self.equal_lengths = True
        self.lengths = torch.zeros(batch_size, dtype=torch.int32, device=k[0].device)
        self.seqlens: Tensor | None = None
        self.states: dict[int, Tensor] = {}
        self.rewindable: int | None = None

    @property
    def max_positions(self) -> int:
        """Positions that a sequence can have in the buffers: ``max_seqlen``, or that in whole pages."""
        slots = self.k[0].shape[1]
        return slots if self.block_table is None else slots * self.block_table.shape[1]

    def check_room(self, batch_size: int, seqlen: int) -> None:
        """Raise ValueError unless ``seqlen`` more tokens of ``batch_size`` sequences fit."""
        if batch_size != self.batch_size:
            raise bad_argument(
                "cache",
                f"a cache of {self.batch_size} sequences for a batch of {batch_size}",
                "equal batch sizes",
                f"make a cache with batch_size={batch_size}",
            )
        if self.length + seqlen > self.max_seqlen:
            raise bad_argument(
                "cache",
                f"{seqlen} more tokens with {self.length} of {self.max_seqlen} positions in use",
                f"at most {self.max_seqlen - self.length} more tokens",
                f"make a cache with max_seqlen of at least {self.length + seqlen}, or reset() this one",
            )

    def check_keys(self, k: Tensor) -> None:
        """Raise ValueError unless keys k (B,S,Hk,D) may be written: room, dtype, no gradient."""
        self.check_room(k.shape[0], k.shape[1])
        if k.dtype != self.k[0].dtype:
            raise bad_argument(
                "cache",
                f"a cache of {self.k[0].dtype} for keys of {k.dtype}",
                "the dtype that the model computes in (under autocast, autocast's)",
                f"make a cache with dtype={k.dtype}",
            )
        if k.requires_grad and torch.is_grad_enabled():
            raise bad_argument(
                "cache",
                "a cache with gradients enabled",
                "no gradients: a cache is for inference",
                "use torch.no_grad() or torch.inference_mode(); to train, leave the cache out",
            )

    def advance(self, seqlen: int, seqlens: Tensor | None = None) -> None:
        """Count the ``seqlen`` tokens that all layers have written, of which only the first ``seqlens[b]`` count.

        seqlens: integers (B,) on the cache's device, in [0, seqlen]; not read here. None is ``seqlen`` for all.
        """
        self.length += seqlen
        self.seqlens = None
        if seqlens is None:
            self.lengths += seqlen
        else:
            self.lengths += seqlens
            self.equal_lengths = False

    def truncate(self, lengths: Sequence[int]) -> None:
        """Keep the first ``lengths[b]`` tokens of each sequence, as after drafts that were not accepted.

        The lengths are known to the host, so that ``length`` is exact afterwards. ValueError if there are not as many
        as sequences, one is negative or above ``length``, or more than ``rewindable`` tokens would be forgotten (all of
        a sequence's may), for which a GPU is waited for.
        """
        if len(lengths) != self.batch_size or not 0 <= min(lengths) <= max(lengths) <= self.length:
            raise bad_argument(
                "lengths",
                list(lengths),
                f"{self.batch_size} numbers from 0 to {self.length}, the tokens in the cache",
                "pass how many tokens of each sequence to keep",
            )
        if self.rewindable is not None:
            self._check_rewindable(lengths, self.rewindable)
        self.length = max(lengths)
        self.equal_lengths = min(lengths) == self.length
        self.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))

    def _check_rewindable(self, lengths: Sequence[int], most: int) -> None:
        before = self.lengths.tolist()
        if any(0 < keep < have - most for keep, have in zip(lengths, before, strict=True)):
            raise bad_argument(
                "lengths",
                f"{list(lengths)} after {before} tokens",
                f"at most {most} less, or 0, since a depthwise convolution can take back no more",
                "keep more tokens, or 0 of them and compute the others anew",
            )

    def reset(self) -> None:
        """Forget all tokens; the buffers stay."""
        self.length = 0
        self.equal_lengths = True
        self.lengths.zero_()


class KVCache(Cache):
    """A contiguous buffer per layer: up to ``max_seqlen`` tokens in each of ``batch_size`` sequences.

    The memory is 2 n_layer B max_seqlen Hk D elements.

    Attributes, beside those of ``Cache``:
        k, v: buffers (B,max_seqlen,Hk,D) by layer.
    """

    def __init__(
        self,
        n_layer: int,
        batch_size: int,
        max_seqlen: int,
        n_head_kv: int,
        d_head: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (batch_size, max_seqlen, n_head_kv, d_head)
        if min(n_layer, *shape) < 1:
            raise bad_argument(
                "KVCache",
                f"n_layer={n_layer}, (batch_size, max_seqlen, n_head_kv, d_head)={shape}",
                "sizes of at least 1",
                "change what is smaller than 1",
            )
        k = [torch.empty(shape, device=device, dtype=dtype) for _ in range(n_layer)]
        v = [torch.empty(shape, device=device, dtype=dtype) for _ in range(n_layer)]
        super().__init__(k, v, batch_size, max_seqlen)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B,S,Hk,D) after the first ``length`` tokens; return all, (B,length+S,Hk,D).

        For layers that do not attend through ``flash_attn_with_kvcache``; sequences must have equal lengths. The
        length stays: the other layers of this pass write to the same positions.
        """
        self.check_keys(k)
        if not self.equal_lengths:
            raise bad_argument(
                "cache",
                "sequences of different lengths",
                "equal lengths, since keys and values are returned as one block",
                "attend with flash_attn_with_kvcache and cache_seqlens=cache.lengths",
            )
        end = self.length + k.shape[1]
        self.k[layer][:, self.length : end] = k
        self.v[layer][:, self.length : end] = v
        return self.k[layer][:, :end], self.v[layer][:, :end]
