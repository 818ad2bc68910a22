"""What generation returns beside token ids, on demand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Columns(NamedTuple):
    """Tokens that follow one another in every row: int64 (B,n), and their log-probabilities, float32 (B,n), if they
    are wanted."""

    tokens: Tensor
    logprobs: Tensor | None


@dataclass
class Acceptance:
    """How drafts fared in speculative decoding, over all rows that had not ended.

    Attributes:
        rounds: passes of the model, each of which checks one draft of every row.
        drafted: tokens that were drafted.
        accepted: those that the model accepted.
    """

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def rate(self) -> float:
        """Accepted share of drafted tokens; 0 if there were none."""
        return self.accepted / self.drafted if self.drafted else 0.0


@dataclass(frozen=True)
class GenerateOutput:
    """Result of ``generate_output``.

    Attributes:
        sequences: int64 (B,S+n), what ``generate`` returns.
        logprobs: float32 (B,n), the log-probability of each new token in the distribution that it was chosen from:
            after the repetition penalty and, with do_sample, temperature and filters. 0 where a row is filled after its
            end. As Hugging Face's ``compute_transition_scores(..., normalize_logits=True)``, but without keeping the
            (B,V) scores of every step. None unless asked for.
        acceptance: of drafts; None without ``draft``.
    """

    sequences: Tensor
    logprobs: Tensor | None = None
    acceptance: Acceptance | None = None
