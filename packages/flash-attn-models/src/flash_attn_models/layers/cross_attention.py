"""Cross-attention: the tokens of one sequence attend to those of another, its context.

Dimensions in comments: B batch, S tokens that ask, C tokens of the context, T and U the same packed, H query heads, Hk
key/value heads, D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from flash_attn_ops.attention import flash_attn_func, flash_attn_varlen_func
from flash_attn_ops.distributed import Partition
from flash_attn_ops.rotary import RotaryEmbedding, apply_rotary_emb
from torch import Tensor, nn

from flash_attn_models.errors import bad_argument
from flash_attn_models.layers.head_sizes import head_sizes
from flash_attn_models.tensor_parallel.heads import QueryPartition
from flash_attn_models.tensor_parallel.plan import SINGLE_PROCESS, TensorParallel


@dataclass(frozen=True)
class ProjectedContext:
    """Keys and values of a context, computed once and attended to by many calls, as in generation.

    Attributes:
        k, v: (B,C,Hk,D), or (U,Hk,D) of packed contexts; of a rank, its own heads. Keys are rotated, if the layer does
            that.
        key_padding_mask: bool (B,C), True is a real token; None: all are.
        cu_seqlens: of packed contexts, int32 (B+1,).
        max_seqlen: of packed contexts, the longest, if known.
    """

    k: Tensor
    v: Tensor
    key_padding_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None


class CrossAttention(nn.Module):
    """out_proj(softmax(scale q k^T) v), with q = Wq x, and [k | v] = Wkv context.

    Args:
        d_model: width of x and of the output.
        n_head: query heads.
        d_context: width of the context; None is d_model.
        n_head_kv: key/value heads, a divisor of n_head; None is n_head.
        d_head: head width D; None is d_model / n_head.
        qkv_bias, out_bias: biases of the projections.
        rotary: rotates queries by their position in x and keys by theirs in the context; None does not.
        causal: token i of x sees token j of the context iff j <= i + C - S.
        window_size: (left, right): iff i + C - S - left <= j <= i + C - S + right; -1 is unbounded.
        softcap: products become ``softcap * tanh(scale q k^T / softcap)``; 0 is off.
        softmax_scale: factor of the scores; None is 1 / sqrt(D).
        sinks: each head has one more logit in its softmax, a parameter, without a value. Zero at first.
        dropout: of the attention probabilities, in training.
        parallel: the ranks over which heads are cut; a single process by default. A rank has whole groups of queries
            with their key/value head; if there are fewer of these than ranks, several ranks hold the same one. Where
            ranks share the tokens in training, x is cut as in ``CausalSelfAttention``, and the context is not.

    Parameters: ``Wq`` (H D rows), ``Wkv`` with rows [k (Hk D) | v (Hk D)], ``out_proj``, and ``sinks`` (H,).
    """

    def __init__(
        self,
        d_model: int,
        n_head: int,
        *,
        d_context: int | None = None,
        n_head_kv: int | None = None,
        d_head: int | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        rotary: RotaryEmbedding | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        softmax_scale: float | None = None,
        sinks: bool = False,
        dropout: float = 0.0,
        parallel: TensorParallel = SINGLE_PROCESS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.parallel = parallel
        heads_kv, self.d_head = head_sizes(d_model, n_head, n_head_kv, d_head)
        self.partition = parallel.heads(n_head, heads_kv, self.d_head)
        self.n_head, self.n_head_kv = map(len, self.partition.heads(parallel.group.rank))  # of this rank
        self.d_context = d_model if d_context is None else d_context
        self.rotary = rotary
        self.causal = causal
        self.window_size = window_size
        self.softcap = softcap
        self.softmax_scale = softmax_scale
        self.dropout = dropout
        self.Wq = parallel.queries(d_model, self.partition, bias=qkv_bias, **factory)
        self.Wkv = parallel.keys_values(self.d_context, self.partition, bias=qkv_bias, **factory)
        self.out_proj = parallel.heads_out(d_model, self.partition, bias=out_bias, **factory)
        self.sinks = nn.Parameter(torch.zeros(self.n_head, **factory)) if sinks else None

    def forward(
        self,
        x: Tensor,
        context: Tensor | ProjectedContext,
        *,
        key_padding_mask: Tensor | None = None,
        offset: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cu_seqlens_context: Tensor | None = None,
        max_seqlen_context: int | None = None,
    ) -> Tensor:
        """x to a tensor of its shape.

        Args:
            x: (B,S,d_model); packed (T,d_model) with ``cu_seqlens``. Where ranks share the tokens in training, this
                rank's part of the first dimension of (S,B,d_model), or of the packed tokens.
            context: (B,C,d_context); packed (U,d_context) with ``cu_seqlens_context``; or what ``project`` made of it,
                which only layers without ``causal`` and ``window_size`` take: what these hide depends on S, and so a
                sequence in pieces would see other things than in one.
            key_padding_mask: of the context, bool (B,C): True is a real token. Others are seen by nobody.
            offset: position of the first token of x for ``rotary``: one int, or integers (B,) below 2^31 with
                ``max_seqlen`` positions in the table.
            cu_seqlens: int32 (B+1,), where each sequence of a packed x begins, and T.
            max_seqlen: the longest sequence of x, a hint; with ``rotary`` and ``cu_seqlens`` or a tensor as offset it
                is needed, and counts the offset too.
            cu_seqlens_context, max_seqlen_context: likewise of the context.

        Returns:
            In the shape of x. A token that sees nothing gets out_proj's bias.

        Raises:
            ValueError: arguments that do not fit together.
        """
        if not isinstance(context, ProjectedContext):
            context = self.project(
                context,
                key_padding_mask=key_padding_mask,
                cu_seqlens=cu_seqlens_context,
                max_seqlen=max_seqlen_context,
            )
        else:
            self._check_projected(key_padding_mask, cu_seqlens_context, max_seqlen_context)
        _check_tokens("x", x, self.Wq.in_features, cu_seqlens)
        if (cu_seqlens is None) != (context.cu_seqlens is None):
            packed, other = ("x", "context") if context.cu_seqlens is None else ("context", "x")
            raise bad_argument(
                "cu_seqlens", f"a packed {packed} and a padded {other}", "both packed or neither", "pack both"
            )
        # Where ranks share the tokens, positions come first.
        positions_first = cu_seqlens is None and self.parallel.cuts_tokens(self.training)
        q = self.Wq(x).unflatten(-1, (self.n_head, self.d_head))
        if positions_first:
            q = q.transpose(0, 1)
        q = self._rotate(q, offset, cu_seqlens, max_seqlen, of_keys=False)
        options: dict[str, Any] = {
            "dropout_p": self.dropout if self.training else 0.0,
            "softmax_scale": self.softmax_scale,
            "causal": self.causal,
            "window_size": self.window_size,
            "softcap": self.softcap,
            "learnable_sink": self.sinks,
        }
        k, v = context.k, context.v
        with self.parallel.randomness_of_heads(options["dropout_p"] > 0.0):
            if cu_seqlens is None or context.cu_seqlens is None:
                out = flash_attn_func(q, k, v, key_padding_mask=context.key_padding_mask, **options)
            else:
                longest = (max_seqlen, context.max_seqlen)
                out = flash_attn_varlen_func(q, k, v, cu_seqlens, context.cu_seqlens, *longest, **options)
        out = out.flatten(-2)
        return self.out_proj(out.transpose(0, 1) if positions_first else out)

    def partitions(self) -> dict[str, tuple[Partition, int]]:
        """How the sinks, the layer's only parameter of its own, are cut: name, partition, dimension."""
        return {} if self.sinks is None else {"sinks": (QueryPartition.of_heads(self.partition, 1), 0)}

    def project(
        self,
        context: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> ProjectedContext:
        """Keys and values of a context, to be given to ``forward`` as often as wanted.

        Args:
            context, key_padding_mask: as those of ``forward``.
            cu_seqlens, max_seqlen: as ``cu_seqlens_context`` and ``max_seqlen_context`` of ``forward``.
        """
        _check_tokens("context", context, self.d_context, cu_seqlens)
        if key_padding_mask is not None and cu_seqlens is not None:
            raise bad_argument(
                "key_padding_mask",
                "a mask beside packed contexts",
                "None: these have no padding",
                "leave it out",
            )
        k, v = self.Wkv(context).unflatten(-1, (2, self.n_head_kv, self.d_head)).unbind(-3)
        k = self._rotate(k, 0, cu_seqlens, max_seqlen, of_keys=True)
        return ProjectedContext(k, v, key_padding_mask, cu_seqlens, max_seqlen)

    def _rotate(
        self,
        heads: Tensor,
        offset: int | Tensor,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        *,
        of_keys: bool,
    ) -> Tensor:
        if self.rotary is None:
            return heads
        if cu_seqlens is None and not isinstance(offset, Tensor):
            positions = offset + heads.shape[1]
        elif max_seqlen is None:
            raise bad_argument(
                "max_seqlen_context" if of_keys else "max_seqlen",
                None,
                "how many positions the rotary table must have, since only the device knows",
                "pass the length of the longest sequence",
            )
        else:
            positions = max_seqlen
        tables = self.rotary.key_tables if of_keys else self.rotary.tables
        cos, sin = tables(positions, heads.device)
        return apply_rotary_emb(
            *(heads, cos, sin, self.rotary.interleaved), seqlen_offsets=offset, cu_seqlens=cu_seqlens
        )

    def _check_projected(self, *of_context: object) -> None:
        if any(value is not None for value in of_context):
            raise bad_argument(
                "context",
                "a ProjectedContext beside the mask or the lengths of a context",
                "one of both: it has them",
                "give them to project()",
            )
        if self.causal or self.window_size != (-1, -1):
            raise bad_argument(
                "context",
                f"a ProjectedContext, with causal={self.causal} and window_size={self.window_size}",
                "a layer whose tokens see the whole context",
                "pass the context itself, with all tokens of x at once",
            )


def _check_tokens(name: str, tokens: Tensor, width: int, cu_seqlens: Tensor | None) -> None:
    form = ("batch", "seqlen") if cu_seqlens is None else ("tokens",)
    if tokens.ndim != len(form) + 1 or tokens.shape[-1] != width:
        beside = "" if cu_seqlens is None else ", since its cu_seqlens are given"
        raise bad_argument(
            name,
            f"shape {tuple(tokens.shape)}",
            f"({', '.join(form)}, {width}){beside}",
            "add the batch dimension, or use a layer of this width",
        )
