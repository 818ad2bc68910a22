"""The attention function that transformers calls.

Dimensions in comments: B batch, S queries, T keys, H query heads, Hk key/value heads, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from flash_attn_ops.attention import flash_attn_func, flash_attn_varlen_func
from torch import Tensor, nn

from flash_attn_models.errors import bad_argument
from flash_attn_models.transformers_integration.packing import (
    bounds_of_restarts,
    packed_cu_seqlens,
    real_tokens,
)

# What other implementations take and this one has no meaning for.
_UNSUPPORTED = {
    "output_attentions": "attention probabilities are never in memory",
    "head_mask": "heads are not masked",
    "position_bias": "there is no bias of relative positions",
    "indices": "keys are not picked one by one",
    "block_indices": "keys are not picked by blocks",
    "sinks": "a sink is of a head, as s_aux, and not of a token",
    "block_table": "continuous batching keeps pages of its own",
    "read_index": "continuous batching keeps pages of its own",
}


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    position_ids: Tensor | None = None,
    deterministic: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer of a transformers model.

    Args:
        query: (B, H, S, D). key: (B, Hk, T, D). value: (B, Hk, T, Dv).
        attention_mask: what :func:`~flash_attn_models.transformers_integration.masks.attention_mask` returns, or a
            mask of the caller's making that broadcasts to (B, H, S, T): bool, True is visible, or added to the scores.
            Such a mask is complete: neither "causal" nor the window is applied besides.
        dropout: of the probabilities.
        scaling: of the scores; None is 1 / sqrt(D).
        sliding_window: each query sees this many last keys, itself among them; without causal as many to either side.
        is_causal: None is the module's.
        s_aux: (H,), a further logit of each head's softmax ("sink").
        cu_seq_lens_q, cu_seq_lens_k: int (N + 1,), bounds of sequences packed into the flattened batch, instead of
            a mask.
        position_ids: int (1, S). Where they do not grow, another packed sequence begins: transformers' own models of
            some families (GPT-OSS in 5.24) do not ask for a mask that says so.

    Returns:
        (B, S, H, Dv), and None for the probabilities. Queries that are padding get 0 in causal attention.

    Raises:
        ValueError: for a mask of another kind, or an option that this has no meaning for.
    """
    for name, reason in _UNSUPPORTED.items():
        if others.get(name) is not None and others[name] is not False:
            raise bad_argument(
                name, "a value", f"None, because {reason}", "use attn_implementation='eager' for it"
            )
    q, k, v = _in_one_dtype(module, query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    causal = _is_causal(module, is_causal)
    options: dict[str, Any] = {
        "dropout_p": dropout,
        "softmax_scale": scaling,
        "softcap": softcap or 0.0,
        "learnable_sink": s_aux,
        "deterministic": bool(deterministic),
    }
    where: dict[str, Any] = {"causal": causal, "window_size": _window(sliding_window, causal)}
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        bounds_q, bounds_k = _given_bounds(cu_seq_lens_q, cu_seq_lens_k, attention_mask)
        out = _attend_packed(q, k, v, bounds_q, bounds_k, **options, **where)
    elif attention_mask is None:
        bounds_by_position = _bounds_by_position(position_ids, q, k)
        if bounds_by_position is None:
            out = flash_attn_func(q, k, v, **options, **where)
        else:
            out = _attend_packed(q, k, v, bounds_by_position, bounds_by_position, **options, **where)
    elif attention_mask.dim() == 4 and (
        attention_mask.dtype == torch.bool or attention_mask.is_floating_point()
    ):
        out = flash_attn_func(q, k, v, **options, **_complete(attention_mask, k))
    elif attention_mask.dim() == 2 and attention_mask.dtype == torch.int32:
        bounds_of_rows = packed_cu_seqlens(attention_mask)
        out = _attend_packed(q, k, v, bounds_of_rows, bounds_of_rows, **options, **where)
    elif attention_mask.dim() == 2 and attention_mask.dtype == torch.bool:
        out = _attend_padded(q, k, v, attention_mask, options, where)
    else:
        raise bad_argument(
            "attention_mask",
            f"shape {tuple(attention_mask.shape)}, {attention_mask.dtype}",
            "None, bool (batch, keys), or bool or floating point (batch, heads, queries, keys)",
            "convert it with attention_mask.bool()",
        )
    return out, None


def _attend_packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Any
) -> Tensor:
    """q (B,S,H,D), k and v (B,T,Hk,D), whose flattened tokens are sequences one after the other."""
    out: Tensor = flash_attn_varlen_func(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_seqlens_q, cu_seqlens_k, **options
    )
    return out.unflatten(0, q.shape[:2])


def _attend_padded(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, options: dict[str, Any], where: dict[str, Any]
) -> Tensor:
    """With a mask of real keys, bool (B,T)."""
    length = mask.shape[1]
    if mask.shape[0] != k.shape[0] or length > k.shape[1] or (where["causal"] and q.shape[1] > length):
        raise bad_argument(
            "attention_mask",
            f"shape {tuple(mask.shape)}",
            f"one entry for each of the {k.shape[1]} keys of {k.shape[0]} rows, at least {q.shape[1]}",
            "give a mask of all tokens so far",
        )
    k, v = k[:, :length], v[:, :length]
    keys = real_tokens(mask)
    has_window = where["window_size"] != (-1, -1)
    if has_window and not (keys.contiguous and q.shape[1] <= length):
        # The window counts padding between real tokens, which packing would take out.
        out: Tensor = flash_attn_func(q, k, v, **options, **where, key_padding_mask=mask)
        return out
    batch, queries = q.shape[:2]
    k, v = (x.flatten(0, 1).index_select(0, keys.indices) for x in (k, v))
    flat = q.flatten(0, 1)
    if not (where["causal"] or has_window):
        # The queries may be of another sequence (cross-attention), so that the mask says nothing of them.
        bounds = torch.arange(0, batch * queries + 1, queries, dtype=torch.int32, device=q.device)
        out = flash_attn_varlen_func(flat, k, v, bounds, keys.cu_seqlens, **options, **where)
        return out.unflatten(0, (batch, queries))
    own = real_tokens(mask, queries)
    packed = flash_attn_varlen_func(
        flat.index_select(0, own.indices), k, v, own.cu_seqlens, keys.cu_seqlens, **options, **where
    )
    out = packed.new_zeros((batch * queries, *packed.shape[1:])).index_copy(0, own.indices, packed)
    return out.unflatten(0, (batch, queries))


def _complete(mask: Tensor, k: Tensor) -> dict[str, Any]:
    """The option for a mask that broadcasts to (B,H,S,T)."""
    if mask.shape[-1] not in (1, k.shape[1]):
        raise bad_argument(
            "attention_mask",
            f"shape {tuple(mask.shape)}",
            f"{k.shape[1]} keys in the last dimension",
            "give a mask of all keys",
        )
    return {"attn_mask": mask} if mask.dtype == torch.bool else {"attn_bias": mask}


def _bounds_by_position(position_ids: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Where sequences packed into one row begin, if there are several."""
    tokens = (1, q.shape[1])
    if position_ids is None or q.shape[:2] != tokens or k.shape[:2] != tokens or position_ids.shape != tokens:
        return None
    if torch.compiler.is_compiling():  # values are not there to be read
        return None
    bounds = bounds_of_restarts(position_ids)
    return bounds if bounds.numel() > 2 else None


def _given_bounds(
    cu_seq_lens_q: Tensor | None, cu_seq_lens_k: Tensor | None, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    # The mask may be what position_ids say of the same sequences: segments, or all of it while compiling.
    says_more = attention_mask is not None and attention_mask.dtype != torch.int32
    if cu_seq_lens_q is None or cu_seq_lens_k is None or (says_more and not torch.compiler.is_compiling()):
        raise bad_argument(
            "cu_seq_lens_q and cu_seq_lens_k",
            "one of them" if not says_more else "both beside an attention_mask",
            "both, and no mask",
            "give the bounds of packed sequences, or a mask of padded ones",
        )
    return cu_seq_lens_q.int(), cu_seq_lens_k.int()


def _window(size: int | None, causal: bool) -> tuple[int, int]:
    if size is None:
        return -1, -1
    return size - 1, -1 if causal else size - 1


def _is_causal(module: nn.Module, given: bool | None) -> bool:
    if given is not None:
        return bool(given)
    of_model = getattr(
        getattr(module, "config", None), "is_causal", True
    )  # False turns decoders into encoders
    return bool(getattr(module, "is_causal", True)) and bool(of_model)


def _in_one_dtype(module: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In the dtype of the values; in that of the weights where norms kept in float32 have widened all three."""
    dtype = v.dtype
    if dtype == torch.float32 and not torch.is_autocast_enabled(v.device.type):
        weights = (part.weight.dtype for part in module.modules() if isinstance(part, nn.Linear))
        narrow = next(weights, dtype)
        dtype = narrow if narrow in (torch.float16, torch.bfloat16) else dtype
    return q.to(dtype), k.to(dtype), v.to(dtype)
