"""Pairwise covering arrays: few cases in which every two values of any two options meet at least once."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import bad_argument

_CANDIDATES = 16  # cases tried for each one kept: more gives slightly fewer cases and takes longer

_Pair = tuple[int, int, int, int]  # option, its value, a later option, its value: all as indices


def pairwise(options: Mapping[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Cases that together hold every pair of values of every two options.

    A greedy covering array: a case starts from a pair that no case holds yet, and each further option gets the value
    that meets the most values for the first time. The number of cases grows with the product of the two longest lists,
    not with the product of all.

    Args:
        options: name of each option -> its values, of any type. A single option gives one case for each value.
        seed: of the choices between equals; the result depends on nothing else.

    Returns:
        Cases, each a value for every option, in the order of ``options``.

    Raises:
        ValueError: for an option without values.

    Source: Cohen et al., "The AETG system: an approach to testing based on combinatorial design", 1997.
    """
    names = list(options)
    for name in names:
        if len(options[name]) == 0:
            raise bad_argument(
                f"options[{name!r}]", "no values", "at least one value", "leave the option out"
            )
    if len(names) < 2:
        return [{name: value} for name in names for value in options[name]]
    sizes = [len(options[name]) for name in names]
    uncovered: dict[
        _Pair, None
    ] = {  # a dict is a set whose order, and so the result, does not depend on hashes
        (a, x, b, y): None
        for a, b in itertools.combinations(range(len(names)), 2)
        for x in range(sizes[a])
        for y in range(sizes[b])
    }
    generator = random.Random(seed)
    cases = []
    while uncovered:
        first = next(iter(uncovered))
        candidates = [_grow(first, sizes, uncovered, generator) for _ in range(_CANDIDATES)]
        case = max(candidates, key=lambda c: sum(pair in uncovered for pair in _pairs(c)))
        for pair in _pairs(case):
            uncovered.pop(pair, None)
        cases.append({name: options[name][index] for name, index in zip(names, case, strict=True)})
    return cases


def _pairs(case: Sequence[int]) -> list[_Pair]:
    return [(a, case[a], b, case[b]) for a, b in itertools.combinations(range(len(case)), 2)]


def _grow(
    first: _Pair, sizes: Sequence[int], uncovered: Mapping[_Pair, None], generator: random.Random
) -> list[int]:
    """A case that holds the pair ``first``: the other options, in random order, take the value of most new pairs."""
    chosen = {first[0]: first[1], first[2]: first[3]}
    others = [option for option in range(len(sizes)) if option not in chosen]
    generator.shuffle(others)
    for option in others:
        values = list(range(sizes[option]))
        generator.shuffle(values)
        chosen[option] = max(values, key=lambda value: _new_pairs(option, value, chosen, uncovered))
    return [chosen[option] for option in range(len(sizes))]


def _new_pairs(option: int, value: int, chosen: Mapping[int, int], uncovered: Mapping[_Pair, None]) -> int:
    return sum(
        ((other, x, option, value) if other < option else (option, value, other, x)) in uncovered
        for other, x in chosen.items()
    )
