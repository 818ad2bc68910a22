"""BERT with its heads: masked-language-model and next-sentence prediction."""

from __future__ import annotations

from typing import NamedTuple

import torch
from flash_attn_ops.activations import activate
from flash_attn_ops.cross_entropy import cross_entropy
from flash_attn_ops.distributed import GroupLike, Partition
from flash_attn_ops.linear_cross_entropy import linear_cross_entropy
from flash_attn_ops.norm import LayerNorm
from torch import Tensor, nn
from torch.nn import functional as F

from flash_attn_models.bert.config import BertConfig
from flash_attn_models.bert.model import BertModel, initialize
from flash_attn_models.bert.tokens import check_like_input
from flash_attn_models.errors import bad_argument
from flash_attn_models.tensor_parallel.plan import SINGLE_PROCESS, TensorParallel

IGNORED_LABEL = -100


class BertMaskedLMOutput(NamedTuple):
    """What ``BertForMaskedLM`` computes.

    Attributes:
        logits: (B,S,vocab_size), (T,vocab_size) of packed input, or (masked tokens, vocab_size); None if labels were
            given. Of a rank in training mode, those of its part of the vocabulary.
        loss: a float32 scalar if labels were given.
    """

    logits: Tensor | None
    loss: Tensor | None


class BertPreTrainingOutput(NamedTuple):
    """What ``BertForPreTraining`` computes.

    Attributes:
        logits: as those of ``BertMaskedLMOutput``.
        seq_relationship_logits: (B,2): the second sentence follows the first, or is a random one.
        loss: a float32 scalar if labels were given: the sum over the kinds of labels that were.
    """

    logits: Tensor | None
    seq_relationship_logits: Tensor
    loss: Tensor | None


class MaskedLMHead(nn.Module):
    """decoder(norm(activation(dense(x)))), where the decoder's weight is the word embedding and its bias is here.

    The decoder is cut over ranks as the word embedding is; all ranks do the rest alike.
    """

    def __init__(
        self,
        config: BertConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        parallel: TensorParallel = SINGLE_PROCESS,
    ) -> None:
        super().__init__()
        self.parallel = parallel
        self.partition = parallel.vocabulary(config.vocab_size)
        self.activation = config.activation
        self.dense = nn.Linear(config.d_model, config.d_model, device=device, dtype=dtype)
        self.norm = LayerNorm(config.d_model, eps=config.norm_eps, device=device, dtype=dtype)
        local = self.partition.local_size(parallel.group.rank)
        self.bias = nn.Parameter(torch.zeros(local, device=device, dtype=dtype))

    def partitions(self) -> dict[str, tuple[Partition, int]]:
        """How parameters are cut: name, partition, dimension."""
        return {"bias": (self.partition, 0)}

    def transform(self, hidden: Tensor) -> Tensor:
        """(...,d_model) -> (...,d_model), what the decoder takes."""
        return self.norm(activate(F.linear(hidden, self.dense.weight), self.activation, self.dense.bias))

    def forward(self, hidden: Tensor, word_embedding: Tensor) -> Tensor:
        """Hidden states (...,d_model) and the word embedding (vocab_size,d_model) -> logits (...,vocab_size).

        The embedding is a rank's part of it, and so are the logits in training mode.
        """
        logits = self.parallel.vocabulary_product(self.transform(hidden), word_embedding, self.bias)
        return logits if self.training else self.parallel.whole_vocabulary(logits, self.partition)

    def loss(self, hidden: Tensor, word_embedding: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of hidden (n,d_model) against labels int64 (n,); all logits never exist together."""
        part = self.parallel.cross_entropy_options(self.partition)
        return linear_cross_entropy(self.transform(hidden), word_embedding, labels, self.bias, **part)


class BertForMaskedLM(nn.Module):
    """BERT as a masked language model. See ``BertModel`` for the arguments and the initial weights."""

    def __init__(
        self,
        config: BertConfig,
        *,
        with_pooler: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        process_group: GroupLike = None,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.bert = BertModel(
            config,
            with_pooler=with_pooler,
            device=device,
            dtype=dtype,
            process_group=process_group,
            sequence_parallel=sequence_parallel,
        )
        self.parallel = self.bert.parallel
        self.head = MaskedLMHead(config, device=device, dtype=dtype, parallel=self.parallel)
        self.reset_parameters()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        masked_tokens_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        padding_free: bool | None = None,
    ) -> BertMaskedLMOutput:
        """Logits of all tokens or of some, or the loss.

        Args:
            input_ids, attention_mask, token_type_ids, cu_seqlens, max_seqlen, padding_free: see
                ``BertModel.forward``. With masked_tokens_mask or labels, padding is always taken out.
            masked_tokens_mask: bool, in the shape of input_ids: logits of these tokens only, in their order. The
                last layer and the head are computed for no others. Padding does not count.
            labels: int64, in the shape of input_ids: the loss, over tokens with a label other than -100, and no
                logits. The last layer and the head are computed for no others. Padding does not count.

        Returns:
            Logits, with zeros at padding that was taken out; or the mean loss (NaN, if no token has a label).

        Raises:
            ValueError: as ``BertModel.forward``; both masked_tokens_mask and labels.
        """
        tokens = (input_ids, attention_mask, token_type_ids, cu_seqlens, max_seqlen, padding_free)
        logits, loss, _ = _masked_lm(self.bert, self.head, tokens, masked_tokens_mask, labels)
        return BertMaskedLMOutput(logits, loss)

    @property
    def head_weight(self) -> Tensor:
        """The output projection (vocab_size, d_model): the word embedding, or a rank's part of it."""
        return self.bert.embeddings.word_embeddings.weight

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new initial weights from torch's global random generator."""
        _initialize(self, self.head)


class BertForPreTraining(nn.Module):
    """BERT with both heads that it was trained with. See ``BertModel`` for the arguments and the initial weights."""

    def __init__(
        self,
        config: BertConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        process_group: GroupLike = None,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.bert = BertModel(
            config,
            device=device,
            dtype=dtype,
            process_group=process_group,
            sequence_parallel=sequence_parallel,
        )
        self.parallel = self.bert.parallel
        self.head = MaskedLMHead(config, device=device, dtype=dtype, parallel=self.parallel)
        self.seq_relationship = nn.Linear(config.d_model, 2, device=device, dtype=dtype)
        self.reset_parameters()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        masked_tokens_mask: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        padding_free: bool | None = None,
    ) -> BertPreTrainingOutput:
        """Logits of both heads, or their loss.

        Args:
            next_sentence_labels: int64 (B,): 0 if the second sentence follows the first, 1 if it is a random one;
                -100 does not count.

        The other arguments, and errors, are those of ``BertForMaskedLM.forward``.
        """
        tokens = (input_ids, attention_mask, token_type_ids, cu_seqlens, max_seqlen, padding_free)
        logits, loss, pooled = _masked_lm(self.bert, self.head, tokens, masked_tokens_mask, labels)
        assert pooled is not None
        relationship = self.seq_relationship(pooled)
        if next_sentence_labels is not None:
            sentence_loss = cross_entropy(relationship, next_sentence_labels)
            loss = sentence_loss if loss is None else loss + sentence_loss
        return BertPreTrainingOutput(logits, relationship, loss)

    @property
    def head_weight(self) -> Tensor:
        """The masked-LM head's output projection (vocab_size, d_model): the word embedding, or a rank's part of it."""
        return self.bert.embeddings.word_embeddings.weight

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new initial weights from torch's global random generator."""
        _initialize(self, self.head)


# The arguments of ``BertModel.forward``, in their order.
Tokens = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, int | None, bool | None]


def _masked_lm(
    bert: BertModel,
    head: MaskedLMHead,
    tokens: Tokens,
    masked_tokens_mask: Tensor | None,
    labels: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Logits or None, loss or None, pooled or None."""
    word_embedding = bert.embeddings.word_embeddings.weight
    input_ids, attention_mask, token_type_ids, cu_seqlens, max_seqlen, padding_free = tokens
    if masked_tokens_mask is None and labels is None:
        batch = bert.prepare(*tokens)
        hidden = bert.encode(batch)
        pooled = None if bert.pooler is None else bert.pooler(batch.first_of_each(hidden))
        return batch.as_input(head(hidden, word_embedding)), None, pooled
    if masked_tokens_mask is not None and labels is not None:
        raise bad_argument(
            "masked_tokens_mask",
            "a mask beside labels",
            "one of the two: labels other than -100 say which tokens are masked",
            "leave masked_tokens_mask out",
        )
    if padding_free is False:
        raise bad_argument(
            "padding_free",
            False,
            "True or None with masked_tokens_mask or labels, whose tokens are picked from packed ones",
            "leave padding_free out",
        )
    name, marks, dtype = (
        ("masked_tokens_mask", masked_tokens_mask, torch.bool)
        if labels is None
        else ("labels", labels, torch.int64)
    )
    assert marks is not None
    packed = None if cu_seqlens is not None else True
    batch = bert.prepare(input_ids, attention_mask, token_type_ids, cu_seqlens, max_seqlen, packed)
    check_like_input(name, marks, input_ids, dtype)
    marks = batch.pack(marks)
    is_masked = marks if labels is None else marks != IGNORED_LABEL
    masked_rows = is_masked.nonzero().flatten()
    hidden, pooled = bert.encode_masked(batch, masked_rows)
    if labels is None:
        return head(hidden, word_embedding), None, pooled
    return None, head.loss(hidden, word_embedding, marks.index_select(0, masked_rows)), pooled


def _initialize(model: BertForMaskedLM | BertForPreTraining, head: MaskedLMHead) -> None:
    initialize(model, model.config.initializer_range)
    nn.init.zeros_(head.bias)
