"""Causal depthwise convolution over the tokens of each sequence, in training and generation.

Dimensions in comments: B batch, S new tokens, T packed tokens, C channels, W width, R rows of the state.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flash_attn_models.errors import bad_argument
from flash_attn_models.layers.kv_cache import Cache
from flash_attn_models.layers.packed import Documents

# How many of the last tokens a cache may forget again (as after drafts that were refused) without loss.
REWINDABLE_TOKENS = 62


class CausalDepthwiseConv(nn.Module):
    """y[t,c] = bias[c] + sum over i of weight[c,0,i] x[t - W + 1 + i, c], where a sequence has zeros in front.

    It starts as the identity: the last tap 1, the others and the bias 0. With W = 3 over queries, keys and values it
    is the "multi-DConv-head attention" of So et al. 2021, "Primer" (arXiv 2109.08668).

    Args:
        channels: C.
        width: W, at least 2.

    Parameters: ``weight`` (C,1,W) and ``bias`` (C,), as those of ``nn.Conv1d`` with C groups.
    """

    def __init__(
        self,
        channels: int,
        width: int = 3,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if width < 2:
            raise bad_argument("width", width, "at least 2 tokens", "leave the convolution out")
        self.width = width
        self.weight = nn.Parameter(torch.empty(channels, 1, width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Make it the identity."""
        self.weight.zero_()
        self.weight[..., -1] = 1.0
        self.bias.zero_()

    def forward(self, x: Tensor, documents: Documents | None = None) -> Tensor:
        """x (B,S,C) -> (B,S,C); or packed (T,C) -> (T,C) with the ``documents`` they are, where rows that belong to
        none get what means nothing."""
        before = self.width - 1
        if documents is None:
            return self._convolve(F.pad(x, (0, 0, before, 0)))
        # Each document gets its own zeros in front, and everything is one long sequence: shapes do not depend on
        # the lengths, and one convolution does for all.
        rows = torch.arange(x.shape[0], device=x.device) + before * (documents.numbers + 1)
        spaced = x.new_zeros(x.shape[0] + before * documents.cu_seqlens.shape[0], x.shape[1])
        spaced = spaced.index_copy(0, rows, x)
        return self._convolve(spaced[None])[0].index_select(0, rows - before)

    def forward_cached(self, x: Tensor, cache: Cache, layer: int) -> Tensor:
        """x (B,S,C), tokens that follow those in the cache -> (B,S,C).

        The cache keeps the last inputs of each sequence for this layer, row ``position % R``; enough of them to
        forget up to 62 tokens again, by lower ``cache.lengths``.
        """
        before = self.width - 1
        state = self._state(x, cache, layer)
        lengths = cache.lengths.long()[:, None]
        last = lengths + torch.arange(-before, 0, device=x.device)  # (B,W-1), positions
        history = state.gather(1, _rows(last, state)).masked_fill((last < 0)[..., None], 0.0)
        _keep(x.detach(), state, lengths, cache.seqlens, before)
        return self._convolve(torch.cat([history, x], dim=1))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, width={self.width}"

    def _convolve(self, x: Tensor) -> Tensor:
        """x (B,S+W-1,C), which begins with what precedes the S tokens -> (B,S,C)."""
        if x.shape[1] < self.width:  # no tokens, which torch refuses
            return self._convolve(F.pad(x, (0, 0, 1, 0)))[:, :0]
        y = F.conv1d(x.transpose(1, 2), self.weight, self.bias, groups=self.weight.shape[0])
        return y.transpose(1, 2).contiguous()  # attention wants the elements of a head side by side

    @torch.inference_mode(False)  # a state made in inference mode could not be written outside of it
    def _state(self, x: Tensor, cache: Cache, layer: int) -> Tensor:
        if layer not in cache.states:
            cache.rewindable = REWINDABLE_TOKENS
            rows = self.width - 1 + REWINDABLE_TOKENS
            cache.states[layer] = torch.empty(
                x.shape[0], rows, x.shape[2], device=x.device, dtype=x.dtype, requires_grad=False
            )
        return cache.states[layer]


def _keep(x: Tensor, state: Tensor, lengths: Tensor, seqlens: Tensor | None, before: int) -> None:
    """Write the last of the tokens x (B,S,C), which follow ``lengths`` (B,1) others, to the state (B,R,C)."""
    tokens, rows = x.shape[1], state.shape[1]
    if tokens <= rows - before:
        # Padding behind a row's own tokens is written too: it takes the place only of tokens too old to be needed.
        positions = lengths + torch.arange(tokens, device=x.device)
        state.scatter_(1, _rows(positions, state), x)
        return
    # More tokens than rows: each row of the state takes the latest of its positions, unless that is older than x.
    own = tokens if seqlens is None else seqlens.long()[:, None]
    end = lengths + own
    latest = end - 1 - (end - 1 - torch.arange(rows, device=x.device)) % rows  # (B,R), positions
    source = (latest - lengths).clamp(min=0)[..., None].expand(-1, -1, x.shape[2])
    state.copy_(torch.where((latest >= lengths)[..., None], x.gather(1, source), state))


def _rows(positions: Tensor, state: Tensor) -> Tensor:
    """Positions (B,n) -> indices (B,n,C) of rows of the state (B,R,C)."""
    return (positions % state.shape[1])[..., None].expand(-1, -1, state.shape[2])
