"""The GPT model: embeddings, blocks, final norm, language-model head."""

from __future__ import annotations

import math
from typing import Any

import torch
from flash_attn_ops.norm import LayerNorm, RMSNorm
from flash_attn_ops.rotary import RotaryEmbedding
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from flash_attn_models.errors import bad_argument
from flash_attn_models.gpt.config import GPTConfig
from flash_attn_models.layers import (
    MLP,
    ALiBi,
    Block,
    CausalSelfAttention,
    DecoderPostNormBlock,
    GatedMLP,
    GPTEmbeddings,
    ParallelBlock,
)
from flash_attn_models.layers.block import add_norm
from flash_attn_models.layers.kv_cache import Cache


class GPTModel(nn.Module):
    """Decoder without a head: token ids (B,S) to hidden states (B,S,d_model) after the final norm, if
    there is one.

    Attributes:
        activation_checkpointing: if set to True, each layer is computed again in the backward pass instead of
            keeping what it computed, which saves memory for about a third more computation. False after
            construction.
    """

    def __init__(
        self, config: GPTConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = config
        self.activation_checkpointing = False
        self.embeddings = GPTEmbeddings(
            config.vocab_size,
            config.d_model,
            n_positions=config.max_seqlen if config.position == "learned" else None,
            position_offset=config.position_offset,
            d_embedding=config.d_embedding,
            scale=config.embedding_scale,
            dropout=config.dropout if config.embedding_dropout is None else config.embedding_dropout,
            **factory,
        )
        positions = _Positions(config, device)
        self.layers = nn.ModuleList(
            _block(config, layer, positions, factory) for layer in range(config.n_layer)
        )
        self.ln_f = _norm(config, factory) if config.prenorm else None

    def forward(
        self, input_ids: Tensor, *, cache: Cache | None = None, seqlens: Tensor | None = None
    ) -> Tensor:
        """input_ids (B,S) -> hidden states (B,S,d_model). See ``GPTLMHeadModel.forward`` for cache and seqlens."""
        _check_input(input_ids, cache, self.config, self.embeddings.word_embeddings.weight.device)
        _check_seqlens(seqlens, input_ids)
        embedded = self.embeddings(input_ids, 0 if cache is None else cache.lengths)
        # What each kind of block passes on to the next, see layers/block.py.
        others = 2 if self.config.parallel_block else 1 if self.config.prenorm else 0
        state: tuple[Any, ...] = (embedded, *[None] * others)
        for layer in self.layers:
            if self.activation_checkpointing and cache is None and torch.is_grad_enabled():
                state = checkpoint(layer, *state, use_reentrant=False)
            else:
                state = layer(*state, cache)
        if cache is not None:
            cache.advance(input_ids.shape[1], seqlens)
        x, *branches = state
        if self.ln_f is None:
            return x
        if self.config.parallel_block:
            x1, residual = branches
            return add_norm(self.ln_f, x, x1=x1, residual=residual)
        return self.ln_f(x, residual=branches[0])


class GPTLMHeadModel(nn.Module):
    """GPT-2, LLaMA and their relatives (``flash_attn_models.gpt.families``), as a language model.

    Weights start as in GPT-2: normal with standard deviation ``config.initializer_range``, divided by
    sqrt(2 n_layer) for the two projections of each layer that write to the residual stream; biases zero,
    norms one.

    Args:
        config: the architecture.
        device, dtype: of the parameters; None is torch's default. On device "meta" nothing is allocated.
    """

    def __init__(
        self, config: GPTConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.transformer = GPTModel(config, device=device, dtype=dtype)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.project_out = (
            None
            if config.d_embedding is None
            else nn.Linear(config.d_model, config.d_embedding, bias=False, **factory)
        )
        # A tied head has no parameter of its own: it reads the embedding's.
        self.lm_head = (
            None
            if config.tie_embeddings
            else nn.Linear(config.embedding_dim, config.vocab_size, bias=config.head_bias, **factory)
        )
        self.reset_parameters()

    def forward(
        self,
        input_ids: Tensor,
        *,
        cache: Cache | None = None,
        seqlens: Tensor | None = None,
        num_last_tokens: int | None = None,
    ) -> Tensor:
        """Logits of the next token at each position.

        Args:
            input_ids: token ids (B,S), int64 or int32.
            cache: keys and values of the tokens before these; those of input_ids are added to it. None starts
                at the beginning and keeps nothing.
            seqlens: integers (B,), the first ``seqlens[b]`` tokens of row b are its own and the rest is padding, which
                the cache forgets and whose logits mean nothing. Values in [1, S], which is not checked: that would
                wait for the device. None is S for all.
            num_last_tokens: logits of only this many last positions of each row, n; None is all, n = S. Where a row
                has fewer than n tokens, its first one comes instead of what it lacks.

        Returns:
            Logits (B,n,vocab_size) in the dtype of the parameters, or of autocast.

        Raises:
            ValueError: input_ids or seqlens of the wrong shape or dtype, on another device, or longer than the context
                or the cache; num_last_tokens not in [1, S]; gradients needed with a cache.
        """
        if num_last_tokens is not None and not 1 <= num_last_tokens <= input_ids.shape[-1]:
            raise bad_argument(
                "num_last_tokens",
                num_last_tokens,
                f"between 1 and the {input_ids.shape[-1]} positions of input_ids",
                "change num_last_tokens, or leave it out for the logits of all positions",
            )
        hidden = self.transformer(input_ids, cache=cache, seqlens=seqlens)
        if num_last_tokens is not None:
            hidden = _last_positions(hidden, seqlens, num_last_tokens)
        if self.project_out is not None:
            hidden = self.project_out(hidden)
        weight = F.normalize(self.head_weight, dim=-1) if self.config.normalize_head else self.head_weight
        logits = F.linear(hidden, weight, None if self.lm_head is None else self.lm_head.bias)
        return logits if self.config.logit_scale == 1.0 else logits * self.config.logit_scale

    @property
    def head_weight(self) -> Tensor:
        """The output projection (vocab_size, embedding_dim), tied or not."""
        head = self.transformer.embeddings.word_embeddings if self.lm_head is None else self.lm_head
        return head.weight

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new initial weights from torch's global random generator."""
        std = self.config.initializer_range
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, (LayerNorm, RMSNorm)):
                module.reset_parameters()
        for name, parameter in self.named_parameters():
            if name.endswith(("mixer.out_proj.weight", "mlp.fc2.weight")):
                nn.init.normal_(parameter, std=std / math.sqrt(2 * self.config.n_layer))

    def num_parameters(self, *, embeddings: bool = True) -> int:
        """Number of parameters; without those of tokens and positions if ``embeddings=False``."""
        count = sum(parameter.numel() for parameter in self.parameters())
        if not embeddings:
            count -= sum(parameter.numel() for parameter in self.transformer.embeddings.parameters())
        return count


def _norm(config: GPTConfig, factory: dict[str, Any], size: int | None = None) -> LayerNorm | RMSNorm:
    norm = LayerNorm if config.norm == "layer_norm" else RMSNorm
    return norm(config.d_model if size is None else size, eps=config.norm_eps, **factory)


def _mlp(config: GPTConfig, factory: dict[str, Any]) -> nn.Module:
    if config.activation == "swiglu":
        return GatedMLP(config.d_model, config.inner_dim, bias=config.mlp_bias, **factory)
    return MLP(
        config.d_model, config.inner_dim, activation=config.activation, bias=config.mlp_bias, **factory
    )


class _Positions:
    """What tells layers the positions: one object, and so one table, for all of them."""

    def __init__(self, config: GPTConfig, device: torch.device | str | None) -> None:
        self.rotary: RotaryEmbedding | None = None
        self.alibi: ALiBi | None = None
        if config.position == "rotary":
            scaling = config.rotary_scaling
            self.rotary = RotaryEmbedding(
                config.num_rotary_dims,
                base=config.rotary_base,
                interleaved=config.rotary_interleaved,
                device=device,
                scaling=None if scaling is None else scaling.build(config.max_seqlen),
            )
        elif config.position == "alibi":
            of_scores = config.head_dim**-0.5 if config.softmax_scale is None else config.softmax_scale
            self.alibi = ALiBi(config.n_head, of_scores if config.alibi_scaled else 1.0)


def _block(config: GPTConfig, layer: int, positions: _Positions, factory: dict[str, Any]) -> nn.Module:
    mixer = CausalSelfAttention(
        config.d_model,
        config.n_head,
        n_head_kv=config.n_head_kv,
        d_head=config.d_head,
        qkv_bias=config.qkv_bias,
        out_bias=config.out_bias,
        rotary=positions.rotary,
        alibi=positions.alibi,
        window=config.window_of(layer),
        softmax_scale=config.softmax_scale,
        softcap=0.0 if config.softcap is None else config.softcap,
        q_norm=_norm(config, factory, config.head_dim) if config.qk_norm else None,
        k_norm=_norm(config, factory, config.head_dim) if config.qk_norm else None,
        dropout=config.attn_dropout,
        layer=layer,
        **factory,
    )
    norm1, mlp = _norm(config, factory), _mlp(config, factory)
    norm2 = None if config.tied_norm else _norm(config, factory)
    if config.parallel_block:
        return ParallelBlock(norm1, mixer, norm2, mlp, dropout=config.dropout)
    assert norm2 is not None  # the config refuses tied_norm otherwise
    block = Block if config.prenorm else DecoderPostNormBlock
    return block(norm1, mixer, norm2, mlp, dropout=config.dropout)


def _last_positions(hidden: Tensor, seqlens: Tensor | None, count: int) -> Tensor:
    """hidden (B,S,d_model) -> (B,count,d_model): the last ones of each row's ``seqlens[b]`` positions."""
    if seqlens is None:
        return hidden[:, -count:]
    positions = seqlens.long()[:, None] + torch.arange(-count, 0, device=seqlens.device)
    return hidden.gather(1, positions.clamp(min=0)[..., None].expand(-1, -1, hidden.shape[-1]))


def _check_seqlens(seqlens: Tensor | None, input_ids: Tensor) -> None:
    if seqlens is None:
        return
    batch = input_ids.shape[:1]
    integers = seqlens.dtype in (torch.int32, torch.int64)
    if seqlens.shape != batch or not integers or seqlens.device != input_ids.device:
        raise bad_argument(
            "seqlens",
            f"shape {tuple(seqlens.shape)}, {seqlens.dtype} on {seqlens.device}",
            f"shape {tuple(batch)}, int32 or int64 on {input_ids.device}",
            "pass how many tokens each row of input_ids has",
        )


def _check_input(input_ids: Tensor, cache: Cache | None, config: GPTConfig, device: torch.device) -> None:
    if input_ids.ndim != 2 or input_ids.dtype not in (torch.int32, torch.int64):
        raise bad_argument(
            "input_ids",
            f"shape {tuple(input_ids.shape)}, {input_ids.dtype}",
            "token ids of shape (batch, seqlen), int64 or int32",
            "add a batch dimension with input_ids[None], or convert with input_ids.long()",
        )
    if input_ids.device != device:
        raise bad_argument(
            "input_ids",
            f"device {input_ids.device}",
            f"the model's device {device}",
            f"use input_ids.to({str(device)!r})",
        )
    seqlen = input_ids.shape[1]
    length = 0 if cache is None else cache.length
    if length + seqlen > config.max_seqlen:
        raise bad_argument(
            "input_ids",
            f"{seqlen} tokens" + (f" after {length} in the cache" if length else ""),
            f"at most the context of max_seqlen={config.max_seqlen} tokens",
            "shorten the input, for example to its last tokens, or build the model with a larger max_seqlen",
        )
    if cache is not None:
        cache.check_room(input_ids.shape[0], seqlen)
