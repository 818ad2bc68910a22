"""Which drafted tokens a model accepts, and what it puts behind them: the arithmetic of speculative decoding.

Source: Leviathan, Kalman and Matias 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318. Dimensions: B rows,
K drafted tokens, V ids.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn_models.generation.sampling import draw_from, most_likely


class Draft(NamedTuple):
    """Proposed continuations.

    Attributes:
        tokens: int64 (B,K).
        probabilities: float32 (B,K,V), the distributions that tokens were drawn from; None if they were not drawn, but
            are certain.
        counts: int64 (B,), only the first so many tokens of a row are proposed; None is K for all.
    """

    tokens: Tensor
    probabilities: Tensor | None = None
    counts: Tensor | None = None


class Verdict(NamedTuple):
    """Of each row the first ``accepted[b]`` drafted tokens stay, and ``token[b]`` follows. Both int64 (B,)."""

    accepted: Tensor
    token: Tensor


def accept_greedy(scores: Tensor, draft: Draft) -> Verdict:
    """Accept what the model would have chosen itself: the most likely token under scores (B,K+1,V), of which
    ``scores[:, i]`` are those after i drafted tokens."""
    best = most_likely(scores)
    accepted = _leading(best[:, :-1] == draft.tokens, draft.counts)
    return Verdict(accepted, best.gather(1, accepted[:, None])[:, 0])


def accept_sampled(scores: Tensor, draft: Draft, generator: torch.Generator | None = None) -> Verdict:
    """Accept at random, so that what comes out is distributed as if drawn from softmax(scores), whatever the draft.

    Token d, drafted with probability q(d), is accepted with probability min(1, p(d) / q(d)). The first one that is
    not is replaced by a draw from max(p - q, 0), normalised; if all are accepted, one more is drawn from p.

    Args:
        scores: (B,K+1,V) float32, those after 0 to K drafted tokens.
        draft: what was proposed.
        generator: source of randomness on the device of the scores; None is torch's global one.
    """
    p = scores.softmax(dim=-1)
    batch, count = draft.tokens.shape
    ids = draft.tokens[..., None]
    p_of_draft = p[:, :count].gather(-1, ids)[..., 0]
    certain = draft.probabilities is None
    q_of_draft = 1.0 if draft.probabilities is None else draft.probabilities.gather(-1, ids)[..., 0]
    chance = torch.empty_like(p_of_draft).uniform_(generator=generator)  # in [0, 1)
    accepted = _leading(chance * q_of_draft < p_of_draft, draft.counts)

    rows = torch.arange(batch, device=p.device)
    p_next = p[rows, accepted]
    if count == 0:
        return Verdict(accepted, draw_from(p_next, generator))
    proposed = draft.counts if draft.counts is not None else torch.full_like(accepted, count)
    was_rejected = (accepted < proposed)[:, None]
    place = accepted.clamp(max=count - 1)
    if certain:
        q_next = torch.zeros_like(p_next).scatter_(1, draft.tokens[rows, place][:, None], 1.0)
    else:
        assert draft.probabilities is not None
        q_next = draft.probabilities[rows, place]
    left = torch.where(was_rejected, (p_next - q_next).clamp(min=0.0), p_next)
    # Nothing is left only where rounding made a rejection of what p and q agree on.
    left = torch.where(left.sum(dim=-1, keepdim=True) > 0, left, p_next)
    return Verdict(accepted, draw_from(left, generator))


def _leading(is_accepted: Tensor, counts: Tensor | None) -> Tensor:
    """How many tokens of each row (B,K) are accepted before the first that is not."""
    if counts is not None:
        is_accepted = is_accepted & (
            torch.arange(is_accepted.shape[1], device=is_accepted.device) < counts[:, None]
        )
    return is_accepted.long().cumprod(dim=1).sum(dim=1)
