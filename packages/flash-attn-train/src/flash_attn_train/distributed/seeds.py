"""Random numbers of ranks that have different data."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_rank(seed: int, step: int, rank: int) -> None:
    """Seeds all generators for a data-parallel rank that starts at an optimizer step: dropout is then independent
    between the ranks. Tensor-parallel ranks, which have one data-parallel rank, stay alike."""
    drawn = np.random.SeedSequence([seed, step, rank]).generate_state(3)
    random.seed(int(drawn[0]))
    np.random.seed(int(drawn[1]))
    torch.manual_seed(int(drawn[2]))
