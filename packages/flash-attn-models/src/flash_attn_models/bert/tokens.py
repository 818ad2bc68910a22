"""What the encoder runs on: a padded batch, or its real tokens packed one sequence after the other.

Dimensions in comments: B batch, S tokens of a padded sequence, T packed tokens, N the width of whatever belongs to a
token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from flash_attn_ops.padding import pad_input
from torch import Tensor

from flash_attn_models.bert.config import BertConfig
from flash_attn_models.errors import bad_argument
from flash_attn_models.layers.packed import Documents, real_tokens

_MASK_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class TokenBatch:
    """The tokens of a batch, padded (B,S) or packed (T,).

    Attributes:
        input_ids, position_ids, token_type_ids: of each token; None types are all 0.
        is_real: of a padded batch with padding, bool (B,S); None: all are.
        cu_seqlens: of packed tokens, int32 (B+1,); None of a padded batch.
        max_seqlen: the longest sequence.
        indices: int64 (T,), where packed tokens were in a padded batch with padding.
        padded_shape: (B,S) of the input, if that was a padded batch.
    """

    input_ids: Tensor
    position_ids: Tensor
    token_type_ids: Tensor | None
    max_seqlen: int
    is_real: Tensor | None = None
    cu_seqlens: Tensor | None = None
    indices: Tensor | None = None
    padded_shape: tuple[int, int] | None = None

    @property
    def where(self) -> dict[str, Any]:
        """What attention needs to know."""
        if self.cu_seqlens is None:
            return {"key_padding_mask": self.is_real}
        return {"cu_seqlens": self.cu_seqlens, "max_seqlen": self.max_seqlen}

    def pack(self, per_token: Tensor) -> Tensor:
        """What belongs to the input's tokens, (B,S,...) or (T,...), in the order of the packed tokens: (T,...)."""
        if self.padded_shape is None:
            return per_token
        flat = per_token.flatten(0, 1)
        return flat if self.indices is None else flat.index_select(0, self.indices)

    def as_input(self, hidden: Tensor) -> Tensor:
        """The encoder's (B,S,N) or (T,N) in the input's shape; zeros at padding that was taken out."""
        if self.cu_seqlens is None or self.padded_shape is None:
            return hidden
        if self.indices is None:
            return hidden.unflatten(0, self.padded_shape)
        return pad_input(hidden, self.indices, *self.padded_shape)

    def first_of_each(self, hidden: Tensor) -> Tensor:
        """The first real token of each sequence, of (B,S,N) or (T,N): (B,N), zeros for a sequence without any."""
        if self.cu_seqlens is not None:
            return first_rows(hidden, self.cu_seqlens)
        if self.is_real is None:
            return hidden[:, 0]
        first = self.is_real.int().argmax(dim=1)
        rows = hidden[torch.arange(hidden.shape[0], device=hidden.device), first]
        return rows.masked_fill(~self.is_real.any(dim=1, keepdim=True), 0.0)


def first_rows(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The first row of each sequence, of packed (T,N): (B,N), zeros for an empty sequence."""
    if hidden.shape[0] == 0:
        return hidden.new_zeros(cu_seqlens.shape[0] - 1, hidden.shape[1])
    starts = cu_seqlens[:-1]
    rows = hidden.index_select(0, starts.clamp(max=hidden.shape[0] - 1))
    return rows.masked_fill((starts == cu_seqlens[1:])[:, None], 0.0)


def prepare_tokens(
    config: BertConfig,
    device: torch.device,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    padding_free: bool | None,
) -> TokenBatch:
    """The batch that these arguments of ``BertModel.forward`` describe; ValueError for those that do not fit."""
    _check_ids("input_ids", input_ids, 2 if cu_seqlens is None else 1, device)
    if token_type_ids is not None:
        _check_ids("token_type_ids", token_type_ids, input_ids.ndim, device)
        _check_shape("token_type_ids", token_type_ids, input_ids)
    if cu_seqlens is not None:
        if attention_mask is not None or padding_free is not None:
            name = "attention_mask" if attention_mask is not None else "padding_free"
            raise bad_argument(
                name, "a value beside cu_seqlens", "None: packed tokens have no padding", f"leave {name} out"
            )
        return _packed_input(config, device, input_ids, token_type_ids, cu_seqlens, max_seqlen)
    if max_seqlen is not None:
        raise bad_argument(
            "max_seqlen", max_seqlen, "None without cu_seqlens", "leave it out, or pass cu_seqlens"
        )
    return _padded_input(config, device, input_ids, attention_mask, token_type_ids, padding_free)


def _padded_input(
    config: BertConfig,
    device: torch.device,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    padding_free: bool | None,
) -> TokenBatch:
    batch, seqlen = input_ids.shape
    if batch == 0 or seqlen == 0:
        raise bad_argument(
            "input_ids", f"shape {tuple(input_ids.shape)}", "at least one token", "skip an empty batch"
        )
    _check_length(seqlen, config)
    if attention_mask is not None:
        _check_mask(attention_mask, input_ids, device)
        attention_mask = attention_mask != 0
    positions = torch.arange(seqlen, device=device)
    if padding_free is False:
        return TokenBatch(input_ids, positions, token_type_ids, seqlen, is_real=attention_mask)
    real = None if attention_mask is None else real_tokens(attention_mask)
    if real is None and padding_free is None:
        return TokenBatch(input_ids, positions, token_type_ids, seqlen)
    if real is None:
        return TokenBatch(
            input_ids.flatten(),
            positions.repeat(batch),
            None if token_type_ids is None else token_type_ids.flatten(),
            seqlen,
            cu_seqlens=torch.arange(0, (batch + 1) * seqlen, seqlen, device=device, dtype=torch.int32),
            padded_shape=(batch, seqlen),
        )
    indices = real.indices
    return TokenBatch(
        input_ids.flatten().index_select(0, indices),
        indices % seqlen,  # a position is a column of the batch, wherever the padding is
        None if token_type_ids is None else token_type_ids.flatten().index_select(0, indices),
        real.max_seqlen,
        cu_seqlens=real.cu_seqlens,
        indices=indices,
        padded_shape=(batch, seqlen),
    )


def _packed_input(
    config: BertConfig,
    device: torch.device,
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int | None,
) -> TokenBatch:
    documents = Documents.of(cu_seqlens, max_seqlen, input_ids.shape[0], device)
    _check_length(documents.max_seqlen, config)
    return TokenBatch(
        input_ids, documents.positions, token_type_ids, documents.max_seqlen, cu_seqlens=cu_seqlens
    )


def rows_before(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Where the rows of each sequence begin among ascending rows int64 (R,) of packed tokens: int32 (B+1,)."""
    return torch.searchsorted(rows, cu_seqlens.long(), out_int32=True)


def with_first_rows(rows: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
    """These rows of packed tokens, and those that begin a sequence, ascending: int64. Waits for a GPU."""
    # One more place takes the beginnings of empty sequences at the end.
    is_wanted = torch.zeros(tokens + 1, dtype=torch.bool, device=rows.device)
    is_wanted = is_wanted.index_fill(0, rows, True).index_fill(0, cu_seqlens[:-1].long(), True)
    return is_wanted[:-1].nonzero().flatten()


def check_like_input(name: str, tensor: Tensor, input_ids: Tensor, dtype: torch.dtype) -> None:
    """ValueError unless the tensor has one value of this dtype for each token of the input."""
    if tensor.dtype != dtype:
        raise bad_argument(name, tensor.dtype, str(dtype), f"convert it with {name}.to({dtype})")
    _check_shape(name, tensor, input_ids)
    _check_device(name, tensor, input_ids.device)


def _check_ids(name: str, ids: Tensor, ndim: int, device: torch.device) -> None:
    if ids.ndim != ndim or ids.dtype not in (torch.int32, torch.int64):
        expected = "(batch, seqlen)" if ndim == 2 else "(tokens,), since cu_seqlens is given"
        raise bad_argument(
            name,
            f"shape {tuple(ids.shape)}, {ids.dtype}",
            f"integers of shape {expected}, int64 or int32",
            f"add a batch dimension with {name}[None], or convert with {name}.long()",
        )
    _check_device(name, ids, device)


def _check_mask(mask: Tensor, input_ids: Tensor, device: torch.device) -> None:
    if mask.dtype not in _MASK_DTYPES:
        raise bad_argument(
            "attention_mask",
            mask.dtype,
            "a bool or integer dtype: 1 is a real token, 0 is padding",
            "pass the tokenizer's mask, not one that is added to attention scores",
        )
    _check_shape("attention_mask", mask, input_ids)
    _check_device("attention_mask", mask, device)


def _check_shape(name: str, tensor: Tensor, input_ids: Tensor) -> None:
    if tensor.shape != input_ids.shape:
        raise bad_argument(
            name,
            f"shape {tuple(tensor.shape)}",
            f"the shape of input_ids, {tuple(input_ids.shape)}",
            "pass one entry per token",
        )


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise bad_argument(
            name, f"device {tensor.device}", f"the model's device {device}", f"use {name}.to({str(device)!r})"
        )


def _check_length(seqlen: int, config: BertConfig) -> None:
    if seqlen > config.max_seqlen:
        raise bad_argument(
            "input_ids",
            f"a sequence of {seqlen} tokens",
            f"at most max_seqlen={config.max_seqlen} tokens",
            "shorten it (tokenizers do with truncation=True), or build the model with a larger max_seqlen",
        )
