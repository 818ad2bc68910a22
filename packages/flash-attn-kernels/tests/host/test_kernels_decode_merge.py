"""What the decode kernel makes of its warps' outputs, in whatever order blocks end: against the softmax of all keys."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from .decode_calls import Call, a_call

Host = Callable[..., list[Any]]
HEAD_DIMS = (8, 40, 64)
NOT_WRITTEN = -1  # bits of an element
STEPS = 10_007  # a prime larger than any number of blocks here


def numbers_at(seed: int, a: Tensor | int, b: Tensor | int, c: Tensor | int, d: Tensor | int) -> Tensor:
    """As the program computes scores and values."""
    mixed = (seed * 8191 + a * 7919 + b * 104_729 + c * 1_299_709 + d * 15_485_863) % 100_003
    return torch.as_tensor(mixed * mixed % 8192, dtype=torch.float64) / 1024 - 4


@dataclass
class Case:
    call: Call
    head_dim: int
    sinks: list[int]  # in thousandths
    broken: int = -1  # the query of each sequence whose scores are no numbers

    def request(self) -> tuple[Any, ...]:
        sinks = (len(self.sinks), *self.sinks)
        return ("merged", *self.call.numbers(), self.head_dim, *sinks, self.broken, STEPS)

    def check(self, answer: dict[str, Any]) -> None:
        call = self.call
        matrices = 1 if call.cu_seqlens else len(call.lengths)
        words = torch.tensor(answer["out"], dtype=torch.int32).to(torch.int16)
        words = words.view(matrices, call.rows, call.heads * self.head_dim + 8)
        assert (words[..., -8:] == NOT_WRITTEN).all(), call
        out = words[..., :-8].unflatten(-1, (call.heads, self.head_dim)).view(torch.float16)
        lse = torch.tensor(answer["lse"], dtype=torch.int32).view(torch.float32)
        lse = lse.view(matrices, call.heads, call.rows)
        for index in call.sequences:
            first, count = call.queries(index)
            if count == 0:
                continue
            rows = 0 if call.cu_seqlens else index, slice(first, first + count)
            expected_out, expected_lse = self.attention(index, count)
            for got, expected, tolerance in (
                (out[rows].double(), expected_out, {"atol": 2e-3, "rtol": 1e-3}),
                (lse[rows[0], :, rows[1]].double(), expected_lse, {"atol": 1e-5, "rtol": 1e-5}),
            ):
                torch.testing.assert_close(got, expected, **tolerance, equal_nan=True, msg=f"{call}")

    def attention(self, index: int, count: int) -> tuple[Tensor, Tensor]:
        call, keys = self.call, torch.arange(self.call.capacity)
        heads = torch.arange(call.heads)
        queries = torch.arange(count)
        scores = numbers_at(1, index, heads[:, None, None], queries[:, None], keys)
        scores = scores.masked_fill((queries == self.broken)[:, None], torch.nan)
        scores = scores.masked_fill(~call.mask(index), -torch.inf)
        values = numbers_at(
            2, index, (heads // call.group)[:, None, None], keys[:, None], torch.arange(self.head_dim)
        )
        lse = scores.logsumexp(-1)
        if self.sinks and index < len(call.lengths):
            lse = torch.logaddexp(lse, torch.tensor(self.sinks, dtype=torch.float64)[:, None] / 1000)
        # A row that sees nothing, and has no sink, is 0.
        weights = (
            torch.where(lse.isneginf(), 0.0, 1.0)[..., None]
            * (scores - lse[..., None]).nan_to_num(-torch.inf).exp()
        )
        weights[lse.isnan()] = torch.nan
        return (weights @ values).transpose(0, 1), lse


def cases(count: int, **options: Any) -> list[Case]:
    result = []
    for _ in range(count):
        call = a_call(random.randint(1, 4), random.choice((1, 3, 8)), random.choice((1, 2)), 700, 6)
        for name, value in options.items():
            setattr(call, name, value)
        sinks = [random.randint(-4000, 8000) for _ in range(call.heads)]
        result.append(Case(call, random.choice(HEAD_DIMS), random.choice((sinks, []))))
    return result


KINDS_OF_PARTS: list[dict[str, Any]] = [
    {"multiprocessors": 1},
    {"multiprocessors": 7},
    {"multiprocessors": 33},
    {"num_splits": 1},
    {"num_splits": 4},
    {"batch_invariant": True},
]


@pytest.mark.parametrize("options", KINDS_OF_PARTS, ids=str)
def test_parts_become_the_attention_of_all_keys(decode_host: Host, options: dict[str, Any]) -> None:
    random.seed(0)
    chosen = cases(12, **options)
    for case, answer in zip(chosen, decode_host([case.request() for case in chosen]), strict=True):
        case.check(answer)


@pytest.mark.parametrize("options", KINDS_OF_PARTS[1:5], ids=str)
def test_scores_that_are_no_numbers_show_in_the_output(decode_host: Host, options: dict[str, Any]) -> None:
    """A query that overflowed must not come out as one that sees nothing."""
    random.seed(1)
    chosen = cases(8, **options)
    for case in chosen:
        case.broken = random.randrange(2)
    answers = decode_host([case.request() for case in chosen])
    for case, answer in zip(chosen, answers, strict=True):
        case.check(answer)
    bits = torch.tensor([bit for answer in answers for bit in answer["lse"]], dtype=torch.int32)
    assert bits.view(torch.float32).isnan().any()


def test_a_long_item_in_many_parts(decode_host: Host) -> None:
    call = Call(heads=2, group=2, rows=1, capacity=64 * 32 * 5, left=-1, right=0, lengths=[64 * 32 * 5 - 3])
    invariant = Call(**{**vars(call), "batch_invariant": True})
    chosen = [Case(call, 8, []), Case(invariant, 8, [500, -2000])]
    for case, answer in zip(chosen, decode_host([case.request() for case in chosen]), strict=True):
        case.check(answer)
