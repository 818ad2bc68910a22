"""The BERT encoder: embeddings, post-norm blocks, pooler."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from flash_attn_ops.distributed import GroupLike
from flash_attn_ops.norm import LayerNorm
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flash_attn_models.bert.config import BertConfig
from flash_attn_models.bert.tokens import (
    TokenBatch,
    first_rows,
    prepare_tokens,
    rows_before,
    with_first_rows,
)
from flash_attn_models.layers.bert_embedding import BertEmbeddings
from flash_attn_models.layers.bidirectional import BidirectionalSelfAttention
from flash_attn_models.layers.post_norm_block import PostNormBlock
from flash_attn_models.tensor_parallel.initial import count_parameters, draw_weights
from flash_attn_models.tensor_parallel.plan import TensorParallel


class BertOutput(NamedTuple):
    """What the encoder computes.

    Attributes:
        hidden: states of the last layer, (B,S,d_model), or (T,d_model) of packed input.
        pooled: (B,d_model), tanh(dense(first token of each sequence)); None without a pooler.
    """

    hidden: Tensor
    pooled: Tensor | None


class Pooler(nn.Module):
    """tanh(dense(x)), of the first token of each sequence."""

    def __init__(
        self, d_model: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.dense = nn.Linear(d_model, d_model, device=device, dtype=dtype)

    def forward(self, first_tokens: Tensor) -> Tensor:
        """(B,d_model) -> (B,d_model)."""
        return self.dense(first_tokens).tanh()


class BertModel(nn.Module):
    """BERT's encoder, with a pooler or without.

    Weights start as BERT's: normal with standard deviation ``config.initializer_range``; biases and the embedding of
    ``pad_token_id`` zero, norms one.

    Args:
        config: the architecture.
        with_pooler: whether there is a pooler.
        device, dtype: of the parameters; None is torch's default. On device "meta" nothing is allocated.
        process_group: the ranks over which heads, MLPs and the vocabulary are cut: a ProcessGroup or a one-dimensional
            DeviceMesh; None is a single process. With one seed on all ranks, weights start as in a single process.
        sequence_parallel: in training mode, what is between layers is cut over the ranks too, along packed tokens:
            padding is always taken out. After backward, ``flash_attn_models.tensor_parallel.reduce_gradients(model)``
            must be called.

    Raises:
        ValueError: heads, widths or a vocabulary that the ranks cannot share.

    Attributes:
        activation_checkpointing: if set to True, each layer is computed again in the backward pass instead of
            keeping what it computed. False after construction.
    """

    def __init__(
        self,
        config: BertConfig,
        *,
        with_pooler: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        process_group: GroupLike = None,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = config
        self.parallel = parallel = TensorParallel.of(process_group, sequence_parallel)
        self.activation_checkpointing = False
        self.embeddings = BertEmbeddings(
            config.vocab_size,
            config.max_seqlen,
            config.n_token_types,
            config.d_model,
            pad_token_id=config.pad_token_id,
            norm_eps=config.norm_eps,
            dropout=config.dropout,
            parallel=parallel,
            **factory,
        )
        self.layers = nn.ModuleList(_block(config, parallel, factory) for _ in range(config.n_layer))
        self.pooler = Pooler(config.d_model, **factory) if with_pooler else None
        self.reset_parameters()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        padding_free: bool | None = None,
    ) -> BertOutput:
        """Hidden states of a padded batch, or of packed sequences.

        Args:
            input_ids: token ids, int64 or int32: (B,S), or (T,) with ``cu_seqlens``.
            attention_mask: bool or integer (B,S), 1 at real tokens and 0 at padding, which may be anywhere; whole
                rows of padding too. None: all tokens are real.
            token_type_ids: segment of each token, in the shape of input_ids; None is 0 everywhere.
            cu_seqlens: int32 (B+1,): input_ids are packed, sequence b from cu_seqlens[b] to cu_seqlens[b+1].
            max_seqlen: with cu_seqlens, the length of the longest sequence. If it is left out the lengths are read
                and checked, for which a GPU is waited for; if it is given they are trusted.
            padding_free: True takes the padding out before the first layer and puts it back after the last: what is
                computed grows with the real tokens alone. False computes for padding as well, and neither waits for a
                GPU nor has shapes that depend on the mask. None does the former if the mask has padding.

        Returns:
            hidden (B,S,d_model) or (T,d_model), and pooled (B,d_model). Hidden states at padding mean nothing (zeros,
            if it was taken out). The pooled token is the first real one; of a sequence without tokens it is zeros,
            before the pooler.

        Raises:
            ValueError: arguments of the wrong shape, dtype or device, or that exclude each other; sequences longer
                than ``config.max_seqlen``.
        """
        batch = self.prepare(input_ids, attention_mask, token_type_ids, cu_seqlens, max_seqlen, padding_free)
        hidden = self.encode(batch)
        pooled = None if self.pooler is None else self.pooler(batch.first_of_each(hidden))
        return BertOutput(batch.as_input(hidden), pooled)

    def prepare(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        padding_free: bool | None,
    ) -> TokenBatch:
        """The tokens that these arguments of ``forward`` describe, checked, and packed if that is wanted."""
        self.parallel.check_mode(
            self.training, without={"padding_free": False} if padding_free is False else None
        )
        if cu_seqlens is None and self.parallel.cuts_tokens(self.training):
            padding_free = True
        device = self.embeddings.word_embeddings.weight.device
        return prepare_tokens(
            *(self.config, device, input_ids, attention_mask, token_type_ids),
            *(cu_seqlens, max_seqlen, padding_free),
        )

    def encode(self, batch: TokenBatch) -> Tensor:
        """Hidden states of all tokens of the batch, as it has them: (B,S,d_model) or (T,d_model)."""
        with self.parallel.randomness_of_tokens(self.training and self._has_dropout):
            hidden = self._embed(batch)
            for layer in self.layers:
                hidden = self._apply_layer(layer, hidden, batch)
        return self.parallel.whole(hidden, self.training, batch.input_ids.shape[0])

    def encode_masked(self, batch: TokenBatch, masked_rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Hidden states of some tokens of a packed batch. The last layer computes nothing else but keys and values.

        Args:
            masked_rows: int64 (R,), ascending rows of the packed tokens.

        Returns:
            (R,d_model), and pooled (B,d_model), None without a pooler.
        """
        assert batch.cu_seqlens is not None
        rows = masked_rows
        if self.pooler is not None:
            rows = with_first_rows(masked_rows, batch.cu_seqlens, batch.input_ids.shape[0])
        cu_rows = rows_before(rows, batch.cu_seqlens)
        *earlier, last = self.layers
        with self.parallel.randomness_of_tokens(self.training and self._has_dropout):
            hidden = self._embed(batch)
            for layer in earlier:
                hidden = self._apply_layer(layer, hidden, batch)
            shared = self.parallel.padded(rows, self.training)
            hidden = self._apply_layer(last, hidden, batch, rows=shared, cu_rows=cu_rows)
        hidden = self.parallel.whole(hidden, self.training, rows.shape[0])
        if self.pooler is None:
            return hidden, None
        pooled = self.pooler(first_rows(hidden, cu_rows))  # a sequence's first token is its first row here
        return hidden.index_select(0, torch.searchsorted(rows, masked_rows)), pooled

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new initial weights from torch's global random generator."""
        initialize(self, self.config.initializer_range)

    def num_parameters(self, *, embeddings: bool = True) -> int:
        """Number of parameters; without those of tokens, positions and token types if ``embeddings=False``."""
        count = count_parameters(self)
        if not embeddings:
            count -= count_parameters(self.embeddings) - count_parameters(self.embeddings.norm)
        return count

    @property
    def _has_dropout(self) -> bool:
        return max(self.config.dropout, self.config.attn_dropout) > 0.0

    def _embed(self, batch: TokenBatch) -> Tensor:
        per_token = (batch.input_ids, batch.position_ids, batch.token_type_ids)
        # Rows that ranks need to share tokens evenly are in no sequence.
        padded = (None if ids is None else self.parallel.padded(ids, self.training) for ids in per_token)
        return self.embeddings(*padded)

    def _apply_layer(self, layer: nn.Module, hidden: Tensor, batch: TokenBatch, **rows: Any) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, hidden, use_reentrant=False, **rows, **batch.where)
        return layer(hidden, **rows, **batch.where)


def initialize(module: nn.Module, std: float) -> None:
    """BERT's initial weights, for every layer inside."""
    for part in module.modules():
        draw_weights(part, std)
        if isinstance(part, LayerNorm):
            part.reset_parameters()


def _block(config: BertConfig, parallel: TensorParallel, factory: dict[str, Any]) -> PostNormBlock:
    def norm() -> LayerNorm:
        return LayerNorm(config.d_model, eps=config.norm_eps, dropout_p=config.dropout, **factory)

    mixer = BidirectionalSelfAttention(
        config.d_model, config.n_head, dropout=config.attn_dropout, parallel=parallel, **factory
    )
    mlp = parallel.mlp(config.d_model, config.inner_dim, config.activation, **factory)
    block = PostNormBlock(mixer, norm(), mlp, norm())
    parallel.mark(block.norm1, block.norm2)
    return block
