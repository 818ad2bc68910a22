"""Key/value cache: one contiguous, preallocated buffer per layer."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn_models.errors import bad_argument


class KVCache:
    """Keys and values of the tokens seen so far: up to ``max_seqlen`` in each of ``batch_size`` sequences.

    All layers of one forward pass ``update`` the same positions; the model then calls ``advance`` once. The
    memory is 2 n_layer B max_seqlen Hk D elements. Meant for inference: gradients do not flow from one pass
    into the one before.

    Attributes:
        length: how many tokens are in the cache, the same for each sequence.
        k, v: buffers (B,max_seqlen,Hk,D) by layer; positions from ``length`` on hold no data.
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
        self.length = 0
        self.batch_size = batch_size
        self.max_seqlen = max_seqlen
        self.k = [torch.empty(shape, device=device, dtype=dtype) for _ in range(n_layer)]
        self.v = [torch.empty(shape, device=device, dtype=dtype) for _ in range(n_layer)]

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

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B,S,Hk,D) after the first ``length`` tokens; return all, (B,length+S,Hk,D).

        ``length`` stays: the other layers of this pass write to the same positions.
        """
        self.check_room(k.shape[0], k.shape[1])
        if k.dtype != self.k[layer].dtype:
            raise bad_argument(
                "cache",
                f"a cache of {self.k[layer].dtype} for keys of {k.dtype}",
                "the dtype that the model computes in (under autocast, autocast's)",
                f"make a cache with dtype={k.dtype}",
            )
        end = self.length + k.shape[1]
        self.k[layer][:, self.length : end] = k
        self.v[layer][:, self.length : end] = v
        return self.k[layer][:, :end], self.v[layer][:, :end]

    def advance(self, seqlen: int) -> None:
        """Count the ``seqlen`` tokens that all layers have written."""
        self.length += seqlen

    def reset(self) -> None:
        """Forget all tokens; the buffers stay."""
        self.length = 0
