"""A model with more or fewer rows in its vocabulary, as for matrix products of a rounder size."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from flash_attn_models.errors import bad_argument
from flash_attn_models.gpt.model import GPTLMHeadModel

_OF_TOKENS = ("transformer.embeddings.word_embeddings.weight", "lm_head.weight", "lm_head.bias")


@torch.no_grad()
def with_vocab_size(model: GPTLMHeadModel, vocab_size: int) -> GPTLMHeadModel:
    """A copy of the model with so many token ids: rows are added behind those that there are, or cut off.

    GPT-2's 50257 tokens as 50304 make the head's matrix products faster; ``with_vocab_size(model, 50257)`` undoes it
    exactly, before the model is saved for others. Added rows are the mean of the others, so that their logits are the
    mean of all logits: none of them is ever the most likely token.

    Args:
        model: whole, not spread over ranks; stays as it is.
        vocab_size: of the copy, larger or smaller.

    Raises:
        ValueError: a model of another kind or spread over ranks; special tokens that would be cut off; rows to add to
            a head whose rows are normalised, of which the mean is not so.
    """
    if not isinstance(model, GPTLMHeadModel) or model.parallel.is_parallel:
        got = "spread over ranks" if isinstance(model, GPTLMHeadModel) else f"a {type(model).__name__}"
        raise bad_argument("model", got, "a whole GPTLMHeadModel", "unwrap it, or load it without ranks")
    config = replace(model.config, vocab_size=vocab_size)
    if config.normalize_head and vocab_size > model.config.vocab_size:
        raise bad_argument(
            "vocab_size",
            vocab_size,
            f"at most {model.config.vocab_size}, since normalize_head is on",
            "keep the vocabulary of this model",
        )
    weights = {
        name: _resized(tensor, vocab_size) if name in _OF_TOKENS else tensor.clone()
        for name, tensor in model.state_dict().items()
    }
    other = GPTLMHeadModel(config, device="meta")
    other.load_state_dict(weights, assign=True)
    for mine, its in zip(other.parameters(), model.parameters(), strict=True):
        mine.requires_grad_(its.requires_grad)
    other.transformer.activation_checkpointing = model.transformer.activation_checkpointing
    return other.train(model.training)


def _resized(rows: Tensor, count: int) -> Tensor:
    """(V, ...) -> (count, ...)."""
    if count <= rows.shape[0]:
        return rows[:count].clone()
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    mean = rows.mean(0, keepdim=True, dtype=wide).to(rows.dtype)
    return torch.cat([rows, mean.expand(count - rows.shape[0], *rows.shape[1:])])
