"""Covering arrays: every pair occurs, the result is reproducible, and there are few cases."""

from __future__ import annotations

import itertools

import pytest
from flash_attn_kernels.testing import pairwise

OPTIONS = {
    "dtype": ["fp16", "bf16", "fp32"],
    "window": [(-1, -1), (4, 2), [0, 0], {"causal": True}],  # values need not be hashable
    "softcap": [0.0, 1.5],
    "layout": ["dense", "packed", "paged", "seqused", "ragged"],
    "only one": [None],
}


def test_every_pair_of_values_occurs() -> None:
    cases = pairwise(OPTIONS)
    for (a, values_a), (b, values_b) in itertools.combinations(OPTIONS.items(), 2):
        for x, y in itertools.product(values_a, values_b):
            assert any(case[a] == x and case[b] == y for case in cases), f"{a}={x} never meets {b}={y}"
    assert all(list(case) == list(OPTIONS) for case in cases)


def test_few_cases_for_many_options() -> None:
    assert 5 * 4 <= len(pairwise(OPTIONS)) <= 5 * 4 + 5
    two_valued = pairwise({f"option {i}": [False, True] for i in range(20)})
    assert len(two_valued) <= 12, "the full product has a million"


def test_the_seed_decides_everything() -> None:
    assert pairwise(OPTIONS, seed=1) == pairwise(OPTIONS, seed=1)
    assert pairwise(OPTIONS, seed=1) != pairwise(OPTIONS, seed=2)


def test_one_option_and_none() -> None:
    assert pairwise({"a": [1, 2]}) == [{"a": 1}, {"a": 2}]
    assert pairwise({}) == []


def test_an_option_without_values_is_refused() -> None:
    with pytest.raises(ValueError, match=r"options\['a'\]: got no values.*leave the option out"):
        pairwise({"a": [], "b": [1]})
