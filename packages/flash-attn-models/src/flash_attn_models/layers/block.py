"""Transformer blocks, arranged so that each residual addition happens inside a norm.

Each block takes and returns its state: what the next norm adds up. ``Block``: the last branch, and the residual
stream without it. ``ParallelBlock``: two branches and the residual stream. ``DecoderPostNormBlock``: the stream alone.
"""

from __future__ import annotations

from typing import Any

from flash_attn_ops.norm import LayerNorm, RMSNorm, layer_norm, rms_norm
from torch import Tensor, nn

from flash_attn_models.layers.kv_cache import Cache
from flash_attn_models.layers.stochastic_depth import StochasticDepth


class Block(nn.Module):
    """One layer: r = r + dropout(mixer(norm1(r))); r = r + dropout(mlp(norm2(r))).

    The sum of a branch and the residual stream is left to the next norm, which adds and normalises in one
    pass over memory. So a block takes and returns a pair: the last branch's output, and the residual without
    it.

    Args:
        norm1, norm2: norms with ``forward(x, residual, prenorm=True) -> (norm(x + residual), x + residual)``. Those of
            flash_attn_ops can drop elements of x in the same pass; ``dropout`` is 0 then.
        mixer: attention, ``forward(x, cache, **where)``.
        mlp: feed-forward layer, ``forward(x)``.
        dropout: of each branch's output.
        drop_path: probability with which a sequence skips a branch, in training.
        residual_in_fp32: keep the residual stream in float32; the norms must know this option.
    """

    def __init__(
        self,
        norm1: nn.Module,
        mixer: nn.Module,
        norm2: nn.Module,
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
        self.dropout = nn.Dropout(dropout)
        self.drop_path = StochasticDepth(drop_path)
        self.sum_options = _sum_options(residual_in_fp32)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, cache: Cache | None = None, **where: Any
    ) -> tuple[Tensor, Tensor]:
        """Branch x (B,S,d_model) and the residual it belongs to (None: none yet) -> both after the layer.

        ``where``: ``documents``, if x is packed (T,d_model).
        """
        x, residual = self.norm1(x, residual=residual, **self.sum_options)
        x = self.drop_path(self.dropout(self.mixer(x, cache, **where)), **where)
        x, residual = self.norm2(x, residual=residual, **self.sum_options)
        return self.drop_path(self.dropout(self.mlp(x)), **where), residual


class ParallelBlock(nn.Module):
    """One layer whose branches have the same input: r = r + dropout(mixer(norm1(r))) + dropout(mlp(norm2(r))).

    One pass over memory adds both branches of the layer before to the residual stream and normalises the sum twice. As
    in GPT-NeoX (two norms), GPT-J and Falcon (one).

    Args:
        norm1: LayerNorm or RMSNorm of flash_attn_ops; its dropout is that of the branches it adds up.
        mixer: attention, ``forward(x, cache, **where)``.
        norm2: like norm1, with the same eps; None shares norm1.
        mlp: feed-forward layer, ``forward(x)``.
        dropout: of each branch's output, if norm1 does not do it.
        drop_path, residual_in_fp32: as those of ``Block``.
    """

    def __init__(
        self,
        norm1: LayerNorm | RMSNorm,
        mixer: nn.Module,
        norm2: LayerNorm | RMSNorm | None,
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
        self.dropout = nn.Dropout(dropout)
        self.drop_path = StochasticDepth(drop_path)
        self.sum_options = _sum_options(residual_in_fp32)

    def forward(
        self,
        x: Tensor,
        x1: Tensor | None = None,
        residual: Tensor | None = None,
        cache: Cache | None = None,
        **where: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Branches x and x1 (B,S,d_model) and the residual they belong to (None: none yet) -> all after the layer."""
        if self.norm2 is None:
            x, residual = add_norm(self.norm1, x, x1=x1, residual=residual, **self.sum_options)
            x1 = x
        else:
            weight1, bias1 = self.norm2.weight, self.norm2.bias
            x, x1, residual = add_norm(
                self.norm1, x, x1=x1, residual=residual, weight1=weight1, bias1=bias1, **self.sum_options
            )
        x = self.drop_path(self.dropout(self.mixer(x, cache, **where)), **where)
        return x, self.drop_path(self.dropout(self.mlp(x1)), **where), residual


class DecoderPostNormBlock(nn.Module):
    """One layer with norms on the residual stream: x = norm1(x + dropout(mixer(x))); x = norm2(x + dropout(mlp(x))).

    Args:
        norm1, norm2: norms with ``forward(x, residual) -> norm(x + residual)``, and perhaps dropout of x.
        mixer: attention, ``forward(x, cache, **where)``.
        mlp: feed-forward layer, ``forward(x)``.
        dropout: of each branch's output, if the norms do not do it.
        drop_path: as that of ``Block``.
    """

    def __init__(
        self,
        norm1: nn.Module,
        mixer: nn.Module,
        norm2: nn.Module,
        mlp: nn.Module,
        *,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = norm1
        self.mixer = mixer
        self.norm2 = norm2
        self.mlp = mlp
        self.dropout = nn.Dropout(dropout)
        self.drop_path = StochasticDepth(drop_path)

    def forward(self, x: Tensor, cache: Cache | None = None, **where: Any) -> tuple[Tensor]:
        """x (B,S,d_model) -> (x,) after the layer, of the same shape."""
        branch = self.drop_path(self.dropout(self.mixer(x, cache, **where)), **where)
        x = self.norm1(branch, residual=x)
        return (self.norm2(self.drop_path(self.dropout(self.mlp(x)), **where), residual=x),)


def add_norm(norm: LayerNorm | RMSNorm, x: Tensor, **options: Any) -> Any:
    """``layer_norm`` or ``rms_norm`` of flash_attn_ops with the parameters and dropout of a module and any of their
    options, of which the modules' own ``forward`` has only a few."""
    function = layer_norm if isinstance(norm, LayerNorm) else rms_norm
    options.setdefault("dropout_p", norm.dropout_p if norm.training else 0.0)
    return function(x, norm.weight, norm.bias, eps=norm.eps, **options)


def _sum_options(residual_in_fp32: bool) -> dict[str, bool]:
    """What a norm is asked beside its input: the sum too, in which dtype."""
    return {"prenorm": True, "residual_in_fp32": True} if residual_in_fp32 else {"prenorm": True}
