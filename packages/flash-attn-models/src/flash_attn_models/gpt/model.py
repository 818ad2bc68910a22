"""The GPT model: embeddings, blocks, final norm, language-model head."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from flash_attn_ops.cross_entropy import cross_entropy
from flash_attn_ops.distributed import GroupLike
from flash_attn_ops.linear_cross_entropy import linear_cross_entropy
from flash_attn_ops.norm import LayerNorm, RMSNorm
from flash_attn_ops.rotary import RotaryEmbedding
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from flash_attn_models.autocast import product_dtype
from flash_attn_models.errors import bad_argument
from flash_attn_models.gpt.checkpointing import check_choice, is_checkpointed
from flash_attn_models.gpt.config import GPTConfig
from flash_attn_models.gpt.documents import read_documents
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
from flash_attn_models.layers.depthwise_conv import CausalDepthwiseConv
from flash_attn_models.layers.kv_cache import Cache
from flash_attn_models.layers.packed import Documents
from flash_attn_models.layers.vocabulary_bias import VocabularyBias
from flash_attn_models.tensor_parallel.initial import count_parameters, draw_weights
from flash_attn_models.tensor_parallel.plan import TensorParallel


class GPTModel(nn.Module):
    """Decoder without a head: token ids (B,S) to hidden states (B,S,d_model) after the final norm, if
    there is one.

    Attributes:
        activation_checkpointing: what is computed again in the backward pass instead of being kept. True: each layer,
            of which only the input is kept, for about a third more computation; n: every n-th layer, from the first
            on; "attention": attention between the two projections of each layer, of which queries, keys and values
            are kept, but neither their rotated copies nor the result; "mlp": the activation of each MLP, for one more
            pass over memory. False after construction.
    """

    def __init__(
        self,
        config: GPTConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        process_group: GroupLike = None,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = config
        self.parallel = parallel = TensorParallel.of(process_group, sequence_parallel)
        self._checkpointing: bool | int | str = False
        self.embeddings = GPTEmbeddings(
            config.vocab_size,
            config.d_model,
            n_positions=config.max_seqlen if config.position == "learned" else None,
            position_offset=config.position_offset,
            d_embedding=config.d_embedding,
            scale=config.embedding_scale,
            dropout=config.dropout if config.embedding_dropout is None else config.embedding_dropout,
            parallel=parallel,
            **factory,
        )
        positions = _Positions(config, device)
        self.layers = nn.ModuleList(
            _block(config, layer, positions, parallel, factory) for layer in range(config.n_layer)
        )
        self.ln_f = _norm(config, factory, dropout=config.dropout) if config.prenorm else None
        parallel.mark(self.ln_f)

    @property
    def activation_checkpointing(self) -> bool | int | str:
        return self._checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, value: bool | int | str) -> None:
        self._checkpointing = check_choice(value)
        layers: Iterable[Any] = self.layers
        for layer in layers:
            layer.mixer.checkpointing = value == "attention"
            layer.mlp.checkpoint_lvl = 1 if value == "mlp" else 0

    def forward(
        self,
        input_ids: Tensor,
        *,
        cache: Cache | None = None,
        seqlens: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """input_ids (B,S) -> hidden states (B,S,d_model). See ``GPTLMHeadModel.forward`` for the other arguments."""
        device = self.embeddings.word_embeddings.weight.device
        documents = read_documents(
            input_ids, self.config.max_seqlen, device, cu_seqlens, max_seqlen, cache=cache, seqlens=seqlens
        )
        if documents is None:
            _check_input(input_ids, cache, self.config, device)
            _check_seqlens(seqlens, input_ids)
        self.parallel.check_mode(
            self.training, input_ids.shape[-1], "input_ids", without={"cache": cache, "seqlens": seqlens}
        )
        with self.parallel.randomness_of_tokens(self.training and self._has_dropout):
            return self._run(input_ids, documents, cache, seqlens)

    def _run(
        self, input_ids: Tensor, documents: Documents | None, cache: Cache | None, seqlens: Tensor | None
    ) -> Tensor:
        if documents is None:
            where: dict[str, Any] = {}
            embedded = self.embeddings(input_ids, 0 if cache is None else cache.lengths)
        else:
            where = {"documents": documents}
            embedded = self.embeddings(input_ids, position_ids=documents.positions)
        if not self.config.residual_in_fp32:
            embedded = embedded.to(product_dtype(embedded))
        # What each kind of block passes on to the next, see layers/block.py.
        others = 2 if self.config.parallel_block else 1 if self.config.prenorm else 0
        state: tuple[Any, ...] = (embedded, *[None] * others)
        if cache is not None:
            cache.seqlens = seqlens
        for number, layer in enumerate(self.layers):
            if is_checkpointed(self._checkpointing, number) and cache is None and torch.is_grad_enabled():
                state = checkpoint(layer, *state, use_reentrant=False, **where)
            else:
                state = layer(*state, cache, **where)
        if cache is not None:
            cache.advance(input_ids.shape[1], seqlens)
        x, *branches = state
        if self.ln_f is None:
            return x
        if self.config.parallel_block:
            x1, residual = branches
            return add_norm(self.ln_f, x, x1=x1, residual=residual)
        return self.ln_f(x, residual=branches[0])

    @property
    def _has_dropout(self) -> bool:
        config = self.config
        return max(config.dropout, config.embedding_dropout or 0.0, config.attn_dropout) > 0.0


class GPTLMHeadModel(nn.Module):
    """GPT-2, LLaMA and their relatives (``flash_attn_models.gpt.families``), as a language model.

    Weights start as in GPT-2: normal with standard deviation ``config.initializer_range``, divided by
    sqrt(2 n_layer) for the two projections of each layer that write to the residual stream; biases zero,
    norms one.

    Args:
        config: the architecture.
        device, dtype: of the parameters; None is torch's default. On device "meta" nothing is allocated.
        process_group: the ranks over which heads, MLPs and the vocabulary are cut: a ProcessGroup or a one-dimensional
            DeviceMesh; None is a single process. With one seed on all ranks, weights start as in a single process.
        sequence_parallel: in training mode, what is between layers is cut over the ranks too, along the positions,
            which they must divide. After backward, ``flash_attn_models.tensor_parallel.reduce_gradients(model)`` must
            be called.

    Raises:
        ValueError: heads, widths or a vocabulary that the ranks cannot share.
    """

    def __init__(
        self,
        config: GPTConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        process_group: GroupLike = None,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.transformer = GPTModel(
            *(config, device, dtype), process_group=process_group, sequence_parallel=sequence_parallel
        )
        self.parallel = self.transformer.parallel
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.project_out = (
            None
            if config.d_embedding is None
            else nn.Linear(config.d_model, config.d_embedding, bias=False, **factory)
        )
        # A tied head has no weight of its own: it reads the embedding's.
        self.lm_head: nn.Module | None = None
        if not config.tie_embeddings:
            self.lm_head = self.parallel.column(
                config.embedding_dim, config.vocab_size, bias=config.head_bias, **factory
            )
        elif config.head_bias:
            self.lm_head = VocabularyBias(config.vocab_size, parallel=self.parallel, **factory)
        self.parallel.mark(self.project_out)
        self.reset_parameters()

    def forward(
        self,
        input_ids: Tensor,
        *,
        cache: Cache | None = None,
        seqlens: Tensor | None = None,
        num_last_tokens: int | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """Logits of the next token at each position.

        Args:
            input_ids: token ids (B,S), int64 or int32; (T,) with ``cu_seqlens``.
            cache: keys and values of the tokens before these; those of input_ids are added to it. None starts
                at the beginning and keeps nothing.
            seqlens: integers (B,), the first ``seqlens[b]`` tokens of row b are its own and the rest is padding, which
                the cache forgets and whose logits mean nothing. Values in [1, S], which is not checked: that would
                wait for the device. None is S for all.
            num_last_tokens: logits of only this many last positions of each row, n; None is all, n = S. Where a row
                has fewer than n tokens, its first one comes instead of what it lacks.
            cu_seqlens: int32 (B+1,): input_ids are packed, document b from cu_seqlens[b] to cu_seqlens[b+1]; each is
                computed as if it were alone. Without cache, seqlens and num_last_tokens.
            max_seqlen: with cu_seqlens, the length of the longest document, or more. If it is left out the lengths are
                read and checked, for which a GPU is waited for; if it is given they are trusted, and tokens behind
                the last document are padding.

        Returns:
            Logits (B,n,vocab_size), or (T,vocab_size), in the dtype of the parameters, or of autocast. Of a model
            spread over ranks, each has all of them in evaluation mode, and in training mode those of its part of the
            vocabulary, for ``cross_entropy(logits, labels, **model.cross_entropy_options)``.

        Raises:
            ValueError: arguments of the wrong shape or dtype, on another device, or that exclude each other; sequences
                longer than the context or the cache; num_last_tokens not in [1, S]; gradients needed with a cache.
        """
        if cu_seqlens is not None and num_last_tokens is not None:
            raise bad_argument(
                "num_last_tokens", num_last_tokens, "None with cu_seqlens", "pick rows of the logits"
            )
        if num_last_tokens is not None and not 1 <= num_last_tokens <= input_ids.shape[-1]:
            raise bad_argument(
                "num_last_tokens",
                num_last_tokens,
                f"between 1 and the {input_ids.shape[-1]} positions of input_ids",
                "change num_last_tokens, or leave it out for the logits of all positions",
            )
        self.parallel.check_mode(self.training, without={"num_last_tokens": num_last_tokens})
        hidden = self.transformer(
            input_ids, cache=cache, seqlens=seqlens, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen
        )
        if num_last_tokens is not None:
            hidden = _last_positions(hidden, seqlens, num_last_tokens)
        hidden, weight, bias = self._head_operands(hidden)
        is_cut = self.parallel.cuts_tokens(self.training)
        logits = self.parallel.vocabulary_product(hidden, weight, bias, is_cut=is_cut)
        if is_cut and cu_seqlens is None:  # positions first
            logits = logits.transpose(0, 1)
        if not self.training:
            logits = self.parallel.whole_vocabulary(logits, self.parallel.vocabulary(self.config.vocab_size))
        return logits if self.config.logit_scale == 1.0 else logits * self.config.logit_scale

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """Mean cross-entropy of the logits of input_ids against labels, float32.

        In a single process logits of all positions never exist together; over ranks, each has its part of the
        vocabulary's.

        Args:
            input_ids, cu_seqlens, max_seqlen: see ``forward``.
            labels: int64, in the shape of input_ids: the token that follows each, or -100 where none is to be
                predicted. Labels are not shifted.
        """
        documents: dict[str, Any] = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        if self.parallel.is_parallel:
            logits = self(input_ids, **documents)
            options = self.cross_entropy_options if self.training else {}
            return cross_entropy(logits.flatten(0, -2), labels.flatten(), inplace_backward=True, **options)
        hidden, weight, bias = self._head_operands(self.transformer(input_ids, **documents))
        return linear_cross_entropy(hidden, weight, labels, bias, logit_scale=self.config.logit_scale)

    def _head_operands(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the output projection multiplies, and adds."""
        if self.project_out is not None:
            hidden = self.project_out(hidden)
        weight = F.normalize(self.head_weight, dim=-1) if self.config.normalize_head else self.head_weight
        bias = None if self.lm_head is None else self.lm_head.bias
        assert bias is None or isinstance(bias, Tensor)
        return hidden, weight, bias

    @property
    def head_weight(self) -> Tensor:
        """The output projection (vocab_size, embedding_dim), tied or not; of a rank, its part of the vocabulary."""
        head = self.lm_head
        if head is None or isinstance(head, VocabularyBias):
            head = self.transformer.embeddings.word_embeddings
        assert isinstance(head.weight, Tensor)
        return head.weight

    @property
    def cache_heads(self) -> int:
        """Key/value heads that this process computes, and so what a cache for this model needs."""
        mixer = self.transformer.layers[0].mixer
        assert isinstance(mixer, CausalSelfAttention)
        return mixer.n_head_kv

    @property
    def cross_entropy_options(self) -> dict[str, Any]:
        """What ``cross_entropy`` of flash_attn_ops must know of this model's logits: a rank's part of the vocabulary,
        where it has only that, in training mode."""
        if not self.training:
            return {}
        return self.parallel.cross_entropy_options(self.parallel.vocabulary(self.config.vocab_size))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new initial weights from torch's global random generator."""
        std = self.config.initializer_range
        for module in self.modules():
            draw_weights(module, std)
            if isinstance(module, (LayerNorm, RMSNorm, CausalDepthwiseConv, VocabularyBias)):
                module.reset_parameters()
            if isinstance(module, CausalSelfAttention) and module.sinks is not None:
                nn.init.zeros_(module.sinks)
        for name, module in self.named_modules():
            if name.endswith(("mixer.out_proj", "mlp.fc2")):
                draw_weights(module, std / math.sqrt(2 * self.config.n_layer))

    def num_parameters(self, *, embeddings: bool = True) -> int:
        """Number of parameters; without those of tokens and positions if ``embeddings=False``."""
        count = count_parameters(self)
        return count if embeddings else count - count_parameters(self.transformer.embeddings)


def _norm(
    config: GPTConfig, factory: dict[str, Any], size: int | None = None, dropout: float = 0.0
) -> LayerNorm | RMSNorm:
    norm = LayerNorm if config.norm == "layer_norm" else RMSNorm
    size = config.d_model if size is None else size
    return norm(size, eps=config.norm_eps, dropout_p=dropout, **factory)


def _mlp(config: GPTConfig, parallel: TensorParallel, factory: dict[str, Any]) -> nn.Module:
    if parallel.is_parallel:
        gated = config.activation == "swiglu"
        activation = "silu" if gated else config.activation
        return parallel.mlp(
            *(config.d_model, config.inner_dim, activation), gated=gated, bias=config.mlp_bias, **factory
        )
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


def _block(
    config: GPTConfig, layer: int, positions: _Positions, parallel: TensorParallel, factory: dict[str, Any]
) -> nn.Module:
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
        softmax_scale=config.softmax_scale_of(layer),
        softcap=0.0 if config.softcap is None else config.softcap,
        q_norm=_norm(config, factory, config.head_dim) if config.qk_norm else None,
        k_norm=_norm(config, factory, config.head_dim) if config.qk_norm else None,
        sinks=config.sinks,
        conv_width=config.conv_width,
        dropout=config.attn_dropout,
        layer=layer,
        parallel=parallel,
        **factory,
    )
    # A branch is dropped from by the norm that adds it to the stream: in a first block with norms in front, norm1 adds
    # nothing but the embedding, which has dropout of its own.
    adds_embedding = config.prenorm and layer == 0
    norm1 = _norm(config, factory, dropout=0.0 if adds_embedding else config.dropout)
    norm2 = None if config.tied_norm else _norm(config, factory, dropout=config.dropout)
    mlp = _mlp(config, parallel, factory)
    parallel.mark(norm1, norm2)
    if config.parallel_block:
        return ParallelBlock(norm1, mixer, norm2, mlp, residual_in_fp32=config.residual_in_fp32)
    assert norm2 is not None  # the config refuses tied_norm otherwise
    if not config.prenorm:
        return DecoderPostNormBlock(norm1, mixer, norm2, mlp)
    return Block(norm1, mixer, norm2, mlp, residual_in_fp32=config.residual_in_fp32)


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
        _check_cache(cache, config, device)
        cache.check_room(input_ids.shape[0], seqlen)


def _check_cache(cache: Cache, config: GPTConfig, device: torch.device) -> None:
    if len(cache.k) != config.n_layer:
        raise bad_argument(
            "cache",
            f"a cache of {len(cache.k)} layers",
            f"{config.n_layer}, the model's",
            "make it with flash_attn_models.generation.make_cache(model, ...)",
        )
    if cache.lengths.device != device:
        raise bad_argument(
            "cache",
            f"device {cache.lengths.device}",
            f"the model's device {device}",
            f"make a cache with device={str(device)!r}",
        )
