"""The pre-norm block of ViT: dropout, stochastic depth and residual addition happen inside its norms."""

from __future__ import annotations

from typing import NamedTuple

import torch
from flash_attn_ops.norm import LayerNorm
from torch import Tensor, nn
from torch.nn import functional as F

from flash_attn_models.layers.block import add_norm
from flash_attn_models.vit.attention import ViTAttention


class Branch(NamedTuple):
    """What the next norm adds up: ``dropout(x * keep) + residual``.

    Attributes:
        x: (B,S,N), the output of the embedding, of an attention or of an MLP.
        residual: (B,S,N), the residual stream without it; None: there is none yet.
        dropout: probability of dropping an element of x.
        keep: float32 (B,), a factor for each sample: 0 if it skips the branch; None is 1.
    """

    x: Tensor
    residual: Tensor | None = None
    dropout: float = 0.0
    keep: Tensor | None = None

    def norm(self, norm: LayerNorm, residual_in_fp32: bool) -> tuple[Tensor, Tensor]:
        """(norm(sum), sum), in one pass over memory; the norm has x's dtype."""
        return add_norm(
            norm,
            self.x,
            residual=self.residual,
            prenorm=True,
            residual_in_fp32=residual_in_fp32,
            dropout_p=self.dropout,
            rowscale=None if self.keep is None else self.keep[:, None].expand(self.x.shape[:-1]),
        )

    def sum(self) -> Tensor:
        """The sum alone, in the dtype of the residual stream."""
        x = self.x if self.keep is None else self.x * self.keep.to(self.x.dtype)[:, None, None]
        x = F.dropout(x, self.dropout)
        return x if self.residual is None else (x + self.residual).to(self.residual.dtype)


class ViTBlock(nn.Module):
    """One layer: r = r + mixer(norm1(r)); r = r + mlp(norm2(r)), where samples may skip a branch in training.

    The sum of a branch and the residual stream is left to the next norm, so a block takes and returns a ``Branch``.

    Args:
        norm1, norm2: norms.
        mixer: attention.
        mlp: feed-forward layer, ``forward(x)``.
        dropout: of each branch's output, in training.
        drop_path: probability with which a sample skips a branch, in training.
        residual_in_fp32: keep the residual stream in float32.
    """

    def __init__(
        self,
        norm1: LayerNorm,
        mixer: ViTAttention,
        norm2: LayerNorm,
        mlp: nn.Module,
        *,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = norm1
        self.mixer = mixer
        self.norm2 = norm2
        self.mlp = mlp
        self.dropout = dropout
        self.drop_path = drop_path
        self.residual_in_fp32 = residual_in_fp32

    def forward(self, branch: Branch, *, only_first: bool = False) -> Branch:
        """All tokens: (B,S,N) -> (B,S,N). With ``only_first`` the first one of these, (B,1,N): of the others nothing
        but keys and values is computed."""
        # One entrance for both: what wraps a layer's call, such as FSDP or compilation, then wraps all that it does.
        x, residual = branch.norm(self.norm1, self.residual_in_fp32)
        if only_first:
            return self._mlp(self._branch(self.mixer.forward_first(x), residual[:, :1]))
        return self._mlp(self._branch(self.mixer(x), residual))

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}, drop_path={self.drop_path}"

    def _mlp(self, branch: Branch) -> Branch:
        x, residual = branch.norm(self.norm2, self.residual_in_fp32)
        return self._branch(self.mlp(x), residual)

    def _branch(self, x: Tensor, residual: Tensor) -> Branch:
        if not self.training:
            return Branch(x, residual)
        return Branch(x, residual, self.dropout, draw_keep(x, self.drop_path))


def draw_keep(x: Tensor, drop_path: float) -> Tensor | None:
    """float32 (B,) for x (B,...): 0 with probability ``drop_path``, else what makes the mean 1; None without."""
    if drop_path == 0.0:
        return None
    stays = 1.0 - drop_path
    return torch.empty(x.shape[0], device=x.device, dtype=torch.float32).bernoulli_(stays).div_(stays)
