"""What transformers' mask functions say, in the smallest form that says all of it.

transformers describes a mask by a function of index tensors ``(batch, head, query, key)``, with or without a mask of
padded tokens, and asks once per forward pass and kind of layer. What is returned here reaches every layer's attention:

===================  ================================================================================================
None                 nothing is masked but what "causal" and the layer's window say
bool (B, T)          True for real keys; T is less than the keys' length where a static cache has room behind them
int32 (B, S)         packed sequences: the number of the sequence that each token belongs to, counted in its row
bool (B, 1, S, T)    anything else, complete: True for each key that a query sees
===================  ================================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flash_attn_models.errors import bad_argument
from flash_attn_models.transformers_integration.model_code import refuse_own_attention, tells_of_windows

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def attention_mask(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int | None = None,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **others: Any,
) -> Tensor | None:
    """The mask for ``attention_forward``, with the arguments of transformers' own mask functions.

    Args:
        q_length, q_offset: queries, and the position of the first one.
        kv_length, kv_offset: keys, and the position of the first one.
        mask_function: which keys each query sees, without padding.
        attention_mask: bool (B, tokens so far), True for real tokens.
        local_size: the window.
        allow_is_causal_skip: False if the function is more than "causal" with that window.
        allow_is_bidirectional_skip: likewise for attention in both directions; None if this is causal.
        use_vmap: the function is of the caller's making.
        config: of the model.
    """
    if q_length is None or kv_length is None or mask_function is None:
        raise bad_argument(
            "transformers",
            "a mask request without q_length, kv_length or mask_function",
            "a version that gives them (5.24 does)",
            "upgrade transformers",
        )

    refuse_own_attention(config)

    def complete() -> Tensor:
        from transformers.masking_utils import sdpa_mask

        mask = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,  # type: ignore[arg-type]  # a tensor, from static caches
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            use_vmap=use_vmap,
            device=device,
            config=config,
            **others,
        )
        assert mask is not None  # which skipping would give
        return mask

    is_causal = allow_is_bidirectional_skip is None
    is_plain = allow_is_causal_skip if is_causal else allow_is_bidirectional_skip
    if use_vmap or (attention_mask is not None and attention_mask.dim() != 2):
        return complete()
    # A cache may hold no more keys than a window or chunk has: they are a whole window, but may be of two chunks.
    has_window = local_size is not None and bool(kv_offset + kv_length > local_size)
    if has_window and not tells_of_windows(config):
        return complete()
    if torch.compiler.is_compiling():  # values are not there to be read, as they are below
        ends_with_last_query = isinstance(q_offset, int) and q_offset + q_length - kv_offset == kv_length
        is_nothing = is_plain and attention_mask is None and not (is_causal and has_window)
        return None if is_nothing and (ends_with_last_query or not is_causal) else complete()
    if not is_plain:
        is_training_step = attention_mask is None and q_length == kv_length and isinstance(q_offset, int)
        if not (is_causal and is_training_step and q_offset == 0):
            return complete()
        segments, complete_is_needed = _segments(mask_function, batch_size, q_length, device)
        return complete() if complete_is_needed else segments

    keys = _real_keys(attention_mask, kv_length, kv_offset)
    if not is_causal:
        return None if keys is None or bool(keys.all()) else keys
    if local_size is not None and has_window:
        queries = torch.arange(q_length, device=device) + q_offset
        if not _is_window(mask_function, batch_size, queries, local_size, kv_offset):
            return complete()
    end = int(q_offset) + q_length - kv_offset
    if end < kv_length:  # a static cache, with room behind the last query
        return torch.ones(batch_size, end, dtype=torch.bool, device=device) if keys is None else keys[:, :end]
    return None if keys is None or bool(keys.all()) else keys


def _real_keys(attention_mask: Tensor | None, kv_length: int, kv_offset: int) -> Tensor | None:
    """(B, kv_length): the part of the mask that the keys have, and False for what it does not tell of."""
    if attention_mask is None:
        return None
    room = kv_offset + kv_length - attention_mask.shape[1]
    return functional.pad(attention_mask, (0, max(room, 0)))[:, kv_offset : kv_offset + kv_length]


def _segments(
    mask_function: MaskFunction, batch_size: int, length: int, device: torch.device | str
) -> tuple[Tensor | None, bool]:
    """The sequences that a row consists of, (B, S), or None for one per row; and whether the mask is something else.

    A token that does not see the one before it begins a sequence: of what transformers combines, packed sequences and
    chunks say so. A token that sees the next one shows a mask that is not causal.
    """
    rows = torch.arange(batch_size, device=device)[:, None]
    tokens = torch.arange(length, device=device)[None]
    head = torch.zeros_like(rows)

    def sees(query: Tensor, key: Tensor) -> Tensor:
        return mask_function(rows, head, query, key).expand(batch_size, query.shape[1])

    if bool(sees(tokens[:, :-1], tokens[:, 1:]).any()):
        return None, True
    begins = ~sees(tokens, (tokens - 1).clamp(min=0))
    begins[:, 0] = True
    segments = begins.cumsum(1, dtype=torch.int32)
    return (None if bool((segments == 1).all()) else segments), False


def _is_window(
    mask_function: MaskFunction, batch_size: int, queries: Tensor, window: int, first_key: int
) -> bool:
    """Whether every query sees the first key of its window. Attention in chunks, which has a size too, does not."""
    rows = torch.arange(batch_size, device=queries.device)[:, None]
    farthest = (queries - window + 1).clamp(min=first_key)
    return bool(mask_function(rows, torch.zeros_like(rows), queries[None], farthest[None]).all())
