"""Token sampling: the filters against brute force, the drawn frequencies against the probabilities."""

from __future__ import annotations

import math

import pytest
import torch
from flash_attn_models.generation import (
    filter_logits,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    sample,
    scale_by_temperature,
)
from flash_attn_models.generation.sampling import most_likely

SHAPES = [(7,), (5, 11), (2, 3, 17)]


def kept(filtered):
    """Indices of the tokens that are left, row by row."""
    return [
        set(row.isfinite().nonzero().flatten().tolist()) for row in filtered.reshape(-1, filtered.shape[-1])
    ]


def rows(logits):
    return logits.double().reshape(-1, logits.shape[-1]).tolist()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 2, 5, 7, 100])
def test_top_k_keeps_the_k_largest(shape, k):
    logits = torch.randn(shape)
    filtered = keep_top_k(logits, k)
    for row, indices in zip(rows(logits), kept(filtered), strict=True):
        assert indices == set(sorted(range(len(row)), key=row.__getitem__)[-k:])
    assert torch.equal(filtered[filtered.isfinite()], logits[filtered.isfinite()])


def test_top_k_keeps_ties():
    assert kept(keep_top_k(torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0]), 2)) == [{1, 2, 3}]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_top_p_keeps_the_smallest_sufficient_set(shape, p):
    logits = 2 * torch.randn(shape, dtype=torch.float64)
    filtered = keep_top_p(logits, p)
    for row, indices in zip(rows(logits), kept(filtered), strict=True):
        total = sum(map(math.exp, row))
        expected, mass = set(), 0.0
        for index in sorted(range(len(row)), key=row.__getitem__, reverse=True):
            if mass < p:
                expected.add(index)
            mass += math.exp(row[index]) / total
        assert indices == expected
    assert torch.equal(filtered[filtered.isfinite()], logits[filtered.isfinite()])


def test_top_p_boundary_and_certainty():
    logits = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log()
    assert kept(keep_top_p(logits, 0.5)) == [{0}]  # exactly p is enough
    assert kept(keep_top_p(logits, 0.500001)) == [{0, 1}]
    assert kept(keep_top_p(torch.tensor([0.0, 50.0, 0.0]), 0.99)) == [{1}]
    assert kept(keep_top_p(torch.full((50000,), -1.0, dtype=torch.bfloat16), 1.0)) == [set(range(50000))]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [1e-9, 0.03, 0.5, 0.99])
def test_min_p_keeps_what_is_likely_enough(shape, p):
    logits = 2 * torch.randn(shape, dtype=torch.float64)
    filtered = keep_min_p(logits, p)
    for row, indices in zip(rows(logits), kept(filtered), strict=True):
        weights = list(map(math.exp, row))
        assert indices == {i for i, weight in enumerate(weights) if weight >= p * max(weights)}
    assert torch.equal(filtered[filtered.isfinite()], logits[filtered.isfinite()])


def test_min_p_of_one_keeps_the_most_likely():
    assert kept(keep_min_p(torch.tensor([1.0, 3.0, 3.0, 2.0]), 1.0)) == [{1, 2}]
    excluded = torch.tensor([-math.inf, 3.0, 2.9])
    assert kept(keep_min_p(excluded, 1e-30)) == [{1, 2}]


def test_repetition_penalty_matches_transformers():
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(4, 50)
    tokens = torch.randint(50, (4, 12))
    seen = torch.zeros(4, 50, dtype=torch.bool).scatter_(1, tokens, True)
    for penalty in (0.5, 1.0, 1.3):
        expected = process.RepetitionPenaltyLogitsProcessor(penalty)(tokens, logits)
        assert torch.equal(penalize_repetition(logits, seen, penalty), expected)


def test_filters_match_transformers():
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = 3 * torch.randn(8, 50)
    expected = process.TemperatureLogitsWarper(0.7)(None, logits)
    expected = process.TopKLogitsWarper(20)(None, expected)
    expected = process.TopPLogitsWarper(0.8)(None, expected)
    torch.testing.assert_close(filter_logits(logits, temperature=0.7, top_k=20, top_p=0.8), expected)
    expected = process.MinPLogitsWarper(0.2)(None, expected)
    torch.testing.assert_close(
        filter_logits(logits, temperature=0.7, top_k=20, top_p=0.8, min_p=0.2), expected
    )


def test_temperature_scales_logits():
    logits = torch.randn(3, 5)
    assert torch.equal(scale_by_temperature(logits, 0.5), logits * 2)


@pytest.mark.parametrize(
    ("options", "probabilities"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 0.5}, [0.16 / 0.3, 0.09 / 0.3, 0.04 / 0.3, 0.01 / 0.3]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0.0, 0.0]),
        ({"top_p": 0.75}, [4 / 9, 3 / 9, 2 / 9, 0.0]),
        ({"top_k": 3, "top_p": 0.6}, [4 / 7, 3 / 7, 0.0, 0.0]),
        ({"min_p": 0.4}, [4 / 9, 3 / 9, 2 / 9, 0.0]),
    ],
)
def test_drawn_frequencies(options, probabilities):
    """Counts lie within 5 standard deviations of their binomial: a false alarm has a probability < 1e-5."""
    n = 40_000
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(2, n // 2, 4)
    drawn = sample(logits, **options, generator=torch.Generator().manual_seed(1))
    assert drawn.shape == (2, n // 2)
    counts = drawn.flatten().bincount(minlength=4).tolist()
    for count, p in zip(counts, probabilities, strict=True):
        assert abs(count - n * p) <= 5 * math.sqrt(n * p * (1 - p))


def test_generator_decides():
    logits = torch.randn(64, 100)
    first = sample(logits, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first, sample(logits, generator=torch.Generator().manual_seed(1)))
    assert not torch.equal(first, sample(logits, generator=torch.Generator().manual_seed(2)))
    state = torch.get_rng_state()
    sample(logits, generator=torch.Generator().manual_seed(1))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"temperature: got 0.0; expected a positive number.*do_sample=False"),
        ({"temperature": float("nan")}, r"temperature: got nan"),
        ({"top_k": 0}, r"top_k: got 0; expected at least 1"),
        ({"top_p": 0.0}, r"top_p: got 0.0; expected a probability in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p: got 1.5"),
        ({"min_p": 0.0}, r"min_p: got 0.0; expected a factor in \(0, 1\]"),
        ({"min_p": 1.5}, r"min_p: got 1.5"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sample(torch.zeros(2, 5), **options)


# A multiple of few, many and no chunks; too small for two steps.
VOCABULARIES = [151936, 128256, 32768, 50257, 32001, 4096]


@pytest.mark.parametrize("size", VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_most_likely_token_is_the_first_of_the_highest(size, dtype):
    scores = torch.randn(2, 3, size).to(dtype)  # in 16 bits the highest occurs several times
    assert torch.equal(most_likely(scores), scores.argmax(-1))
    assert torch.equal(most_likely(scores[:, -1]), scores[:, -1].argmax(-1))
    ties = torch.randint(3, (4, size)).to(dtype)
    for row, first in zip(ties, (0, size // 2, size - 2, 1), strict=True):
        row[first:] = torch.where(row[first:] == 2, 3, row[first:])
        row[[first, size - 1]] = 3
        row[:first] = -torch.inf
    assert most_likely(ties).tolist() == [0, size // 2, size - 2, 1]
    excluded = torch.full((2, size), -torch.inf, dtype=dtype)
    excluded[1, size - 1] = torch.finfo(dtype).min
    assert most_likely(excluded).tolist() == [0, size - 1]
