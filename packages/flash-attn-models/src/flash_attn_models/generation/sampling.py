"""Choosing the next token from logits: pure functions over the last dimension, whatever the leading ones.

Filters set the logits of excluded tokens to -inf.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn_models.errors import bad_argument


def scale_by_temperature(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature, for temperature > 0: below 1 favours likely tokens, above 1 evens them out."""
    if not temperature > 0:
        raise bad_argument(
            "temperature", temperature, "a positive number", "use do_sample=False for the most likely token"
        )
    return logits / temperature


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits and those that tie with the k-th; k >= V keeps all."""
    if k < 1:
        raise bad_argument("top_k", k, "at least 1", "leave top_k out to keep all tokens")
    threshold = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < threshold, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Nucleus: keep the fewest most likely tokens that together have a probability of at least p.

    A token stays iff the tokens before it, in order of falling probability, sum to less than p; so at least
    one stays. Source: Holtzman et al. 2020, arXiv 1904.09751.
    """
    if not 0 < p <= 1:
        raise bad_argument("top_p", p, "a probability in (0, 1]", "leave top_p out to keep all tokens")
    sorted_logits, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = sorted_logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    before = probabilities.cumsum(dim=-1) - probabilities
    # Rounding leaves the last sums a little below 1; p = 1 excludes nothing, whatever they are.
    excluded = (before >= p) & (p < 1)
    return logits.masked_fill(torch.zeros_like(excluded).scatter(-1, order, excluded), -torch.inf)


def filter_logits(
    logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Apply ``scale_by_temperature``, ``keep_top_k``, ``keep_top_p`` in this order; None is no filter."""
    logits = scale_by_temperature(logits, temperature)
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    return logits


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a token from each row of logits (..., V), filtered by ``filter_logits`` -> (...), int64.

    ``generator`` is the source of randomness, on the device of the logits; None is torch's global one.
    """
    logits = filter_logits(logits.float(), temperature=temperature, top_k=top_k, top_p=top_p)
    drawn = torch.multinomial(logits.softmax(dim=-1).flatten(0, -2), 1, generator=generator)
    return drawn.view(logits.shape[:-1])
