"""Choosing the next token from logits: pure functions over the last dimension, whatever the leading ones.

Filters set the logits of excluded tokens to -inf.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flash_attn_models.errors import bad_argument
from flash_attn_models.generation.numbers import read_real, read_whole

# From this size on, a row is reduced in two steps, if it can be cut into between so many equal chunks.
_LARGE_VOCABULARY = 32768
_FEWEST_CHUNKS, _MOST_CHUNKS = 64, 512

# Below this temperature quotients may exceed the range of the dtype.
_COLD = 1e-3


def scale_by_temperature(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature, for temperature > 0: below 1 favours likely tokens, above 1 evens them out.

    Below 0.001 it is (logits - their maximum) / temperature, which means the same and does not overflow.
    """
    expected, fix = "a positive number", "use do_sample=False for the most likely token"
    temperature = read_real("temperature", temperature, expected, fix)
    if not 0 < temperature < math.inf:
        raise bad_argument("temperature", temperature, expected, fix)
    if temperature < _COLD:
        logits = logits - logits.amax(dim=-1, keepdim=True)
        temperature = max(temperature, torch.finfo(logits.dtype).tiny)
    return logits / temperature


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits and those that tie with the k-th; k >= V keeps all."""
    expected, fix = "at least 1", "leave top_k out to keep all tokens"
    k = read_whole("top_k", k, expected, fix)
    if k < 1:
        raise bad_argument("top_k", k, expected, fix)
    threshold = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < threshold, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Nucleus: keep the fewest most likely tokens that together have a probability of at least p.

    A token stays iff the tokens before it, in order of falling probability, sum to less than p; so at least
    one stays. Source: Holtzman et al. 2020, arXiv 1904.09751.
    """
    expected, fix = "a probability in (0, 1]", "leave top_p out to keep all tokens"
    p = read_real("top_p", p, expected, fix)
    if not 0 < p <= 1:
        raise bad_argument("top_p", p, expected, fix)
    sorted_logits, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = sorted_logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    before = probabilities.cumsum(dim=-1) - probabilities
    # Rounding leaves the last sums a little below 1; p = 1 excludes nothing, whatever they are.
    excluded = (before >= p) & (p < 1)
    return logits.masked_fill(torch.zeros_like(excluded).scatter(-1, order, excluded), -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep tokens with at least p times the probability of the most likely one, which always stays.

    Source: Nguyen et al. 2024, arXiv 2407.01082.
    """
    expected, fix = "a factor in (0, 1]", "leave min_p out to keep all tokens"
    p = read_real("min_p", p, expected, fix)
    if not 0 < p <= 1:
        raise bad_argument("min_p", p, expected, fix)
    # Ratios of probabilities are differences of logits: no softmax is needed. In 16 bits the bound would be rounded.
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.masked_fill(wide < wide.amax(dim=-1, keepdim=True) + math.log(p), -torch.inf)


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that occurred before less likely: positive logits divided by the penalty, negative ones times it.

    Args:
        logits: (..., V).
        seen: bool (..., V), which tokens occurred.
        penalty: positive; 1 changes nothing, and below 1 makes them more likely.

    Source: Keskar et al. 2019, arXiv 1909.05858, in the form of Hugging Face's ``repetition_penalty``.
    """
    expected, fix = "a positive number", "leave it out, or use a value such as 1.1"
    penalty = read_real("repetition_penalty", penalty, expected, fix)
    if not 0 < penalty < math.inf:
        raise bad_argument("repetition_penalty", penalty, expected, fix)
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def filter_logits(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """Apply ``scale_by_temperature``, ``keep_top_k``, ``keep_top_p``, ``keep_min_p`` in this order; None is no
    filter."""
    if temperature != 1:
        logits = scale_by_temperature(logits, temperature)
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    if min_p is not None:
        logits = keep_min_p(logits, min_p)
    return logits


def most_likely(scores: Tensor) -> Tensor:
    """The token with the highest score of each row of scores (..., V), the lowest one of several -> (...), int64.

    It is ``scores.argmax(-1)``. On a GPU that is a reduction by few threads for a small batch; over a large vocabulary
    the highest scores of chunks, which many threads find at once, and then the token within the first of the best
    chunks, are there sooner.
    """
    size = scores.shape[-1]
    count = math.gcd(size, _MOST_CHUNKS)
    if size < _LARGE_VOCABULARY or count < _FEWEST_CHUNKS:
        return scores.argmax(dim=-1)
    chunks = scores.unflatten(-1, (count, size // count))
    best = chunks.amax(dim=-1).argmax(dim=-1, keepdim=True)  # (..., 1)
    chunk = torch.take_along_dim(chunks, best[..., None], dim=-2)  # (..., 1, V / count)
    return (best * (size // count) + chunk.argmax(dim=-1)).squeeze(-1)


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a token from each row of logits (..., V), filtered by ``filter_logits`` -> (...), int64.

    ``generator`` is the source of randomness, on the device of the logits; None is torch's global one.
    """
    logits = filter_logits(logits.float(), temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    return draw(logits, generator)


def draw(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw a token from each row of logits (..., V), float32, as they are -> (...), int64."""
    return draw_from(logits.softmax(dim=-1), generator)


def draw_from(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw a token from each row of weights (..., V), float32, non-negative with a positive sum -> (...), int64."""
    # A race of exponential clocks: the token i that minimises Exp(1) / p_i is drawn with probability p_i. It is what
    # torch.multinomial computes too, which however makes the host wait for a check of the probabilities.
    clocks = torch.empty_like(weights).exponential_(generator=generator)
    return (weights / clocks.clamp_min_(torch.finfo(clocks.dtype).tiny)).argmax(dim=-1)
