"""Every thread of the kernel that appends to a cache: against the rule, row by row, with all memory around."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

Host = Callable[..., list[Any]]
ROTARY_TYPES = (torch.float16, torch.bfloat16, torch.float32)
NAMES = ("k", "v", "q", "q_out", "k_cache", "v_cache")


def bits(x: Tensor) -> list[int]:
    flat = x.flatten()
    return flat.view(torch.int32).tolist() if x.dtype == torch.float32 else flat.view(torch.int16).tolist()


def listed(numbers: list[int]) -> list[int]:
    return [len(numbers), *numbers]


def flattened(lists: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(lists))


class Strided:
    """A tensor (batch, rows, heads, dim), or packed, somewhere in memory: dimensions in any order, gaps between."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        order = [*random.sample(range(len(shape) - 1), len(shape) - 1), len(shape) - 1]
        strides, stride = [0] * len(shape), 1
        for d in reversed(order):
            strides[d] = stride
            stride = stride * max(shape[d], 1) + random.choice((0, 3))
        self.first, self.strides = random.randrange(9), strides
        self.memory = torch.randn(self.first + stride + 5).to(dtype)
        self.tensor = self.on(self.memory, shape)

    def on(self, memory: Tensor, shape: tuple[int, ...]) -> Tensor:
        return memory.as_strided(shape, self.strides, self.first)

    def numbers(self) -> list[int]:
        batch = [0] if len(self.strides) == 3 else []
        return [*listed(bits(self.memory)), self.first, *batch, *self.strides[:-1]]


@dataclass
class Case:
    dtype: torch.dtype
    kv_heads: int
    heads: int
    head_dim: int
    head_dim_v: int
    lengths: list[int]
    capacity: int
    page_size: int
    pages: int  # or entries, of the cache
    entries: list[int]  # empty without; of the cache or, with pages, of the table; some do not exist
    table: list[list[int]]  # empty without; some pages do not exist
    cu_added: list[int]  # empty if dense
    cu_queries: list[int]
    rows: int  # of k
    rows_q: int
    rotary_type: torch.dtype
    rotary_dim: int  # 0 without rotation
    interleaved: bool
    per_position: bool
    counters: list[int]  # all but the last one become 0
    tensors: dict[str, Strided] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def new(rows: int, heads: int, dim: int, packed: list[int]) -> Strided:
            return Strided(
                (rows, heads, dim) if packed else (len(self.lengths), rows, heads, dim), self.dtype
            )

        self.tensors["k"] = new(self.rows, self.kv_heads, self.head_dim, self.cu_added)
        self.tensors["v"] = new(self.rows, self.kv_heads, self.head_dim_v, self.cu_added)
        self.tensors["q"] = new(self.rows_q, self.heads, self.head_dim, self.cu_queries)
        self.tensors["q_out"] = new(self.rows_q, self.heads, self.head_dim, self.cu_queries)
        for name, dim in (("k_cache", self.head_dim), ("v_cache", self.head_dim_v)):
            self.tensors[name] = Strided((self.pages, self.page_size, self.kv_heads, dim), self.dtype)
        angles = torch.randn(max(self.capacity, 1), self.rotary_dim // 2)
        self.cos, self.sin = (x.to(self.rotary_type) for x in (angles.cos(), angles.sin()))

    def request(self) -> tuple[Any, ...]:
        stride = len(self.table[0]) if self.table else 0
        pages = [page for row in self.table for page in row]
        lists = [self.lengths, self.entries, pages, self.cu_added, self.cu_queries]
        tables = [bits(self.cos), bits(self.sin)]
        return (
            *("append", int(self.dtype == torch.bfloat16), self.kv_heads, self.heads, self.head_dim),
            *(self.head_dim_v, self.rows, self.rows_q, self.capacity, self.page_size),
            *(self.pages, len(self.table), stride),
            *flattened(map(listed, lists)),
            *(ROTARY_TYPES.index(self.rotary_type), self.cos.shape[0], self.rotary_dim),
            *(int(self.interleaved), int(self.per_position)),
            *flattened(map(listed, tables)),
            *flattened(self.tensors[name].numbers() for name in NAMES),
            *listed(self.counters),
        )

    def rotated(self, x: Tensor, position: int) -> Tensor:
        """Pairs of elements as complex numbers, each turned by the angle of the position; (heads, dim)."""
        half = self.rotary_dim // 2
        if half == 0:
            return x
        turned, rest = x[:, : 2 * half].float(), x[:, 2 * half :]
        real, imaginary = turned.unflatten(1, (half, 2) if self.interleaved else (2, half)).unbind(
            2 if self.interleaved else 1
        )
        cos, sin = (table[min(max(position, 0), self.capacity - 1)].float() for table in (self.cos, self.sin))
        pair = real * cos - imaginary * sin, real * sin + imaginary * cos
        result = torch.stack(pair, 2).flatten(1) if self.interleaved else torch.cat(pair, 1)
        return torch.cat((result.to(x.dtype), rest), 1)

    def rows_of(self, cu_seqlens: list[int], rows: int) -> Iterator[tuple[Any, int, int]]:
        """Place in the tensor, sequence and number in it; the sequence is -1 for rows behind the last one."""
        if not cu_seqlens:
            for index in range(len(self.lengths)):
                yield from (((index, number), index, number) for number in range(rows))
            return
        for index, (begin, end) in enumerate(itertools.pairwise(cu_seqlens)):
            yield from ((begin + number, index, number) for number in range(end - begin))
        yield from ((row, -1, 0) for row in range(cu_seqlens[-1], rows))

    def place(self, index: int, position: int) -> tuple[int, int] | None:
        """Page, or entry, and row in it."""
        if not 0 <= position < self.capacity:
            return None
        entry = self.entries[index] if self.entries else index
        if not self.table:
            return (entry, position) if 0 <= entry < self.pages else None
        if not 0 <= entry < len(self.table):
            return None
        page = self.table[entry][position // self.page_size]
        return (page, position % self.page_size) if 0 <= page < self.pages else None

    def expected(self) -> dict[str, list[int]]:
        memory = {name: self.tensors[name].memory.clone() for name in ("q_out", "k_cache", "v_cache")}
        view = {name: self.tensors[name].on(x, self.tensors[name].tensor.shape) for name, x in memory.items()}
        for row, index, number in self.rows_of(self.cu_added, self.rows):
            position = self.lengths[index] + number
            place = None if index < 0 else self.place(index, position)
            if place is not None:
                view["k_cache"][place] = self.rotated(self.tensors["k"].tensor[row], position)
                view["v_cache"][place] = self.tensors["v"].tensor[row]
        for row, index, number in self.rows_of(self.cu_queries, self.rows_q):
            x = self.tensors["q"].tensor[row]
            position = self.lengths[index] + (number if self.per_position else 0)
            view["q_out"][row] = x if index < 0 else self.rotated(x, position)
        zeroed = {"zeroed": [0] * (len(self.counters) - 1) + self.counters[-1:]}
        return {name: [bit & 0xFFFF for bit in bits(x)] for name, x in memory.items()} | zeroed


def cumulative(batch: int, most: int) -> list[int]:
    counts = [random.choice((0, 1, random.randint(0, most))) for _ in range(batch)]
    return [0, *torch.tensor(counts).cumsum(0).tolist()]


def a_case(dtype: torch.dtype) -> Case:
    batch, head_dim = random.randint(1, 5), 2 * random.randint(1, 40)
    paged, with_entries = random.randrange(2), random.randrange(2)
    page_size, pages = random.choice((1, 4, 16)), random.randint(1, 5)
    capacity = page_size * pages if paged else random.randint(1, 40)
    in_use = batch + 2 if with_entries else batch
    table = []
    if paged:
        numbers = random.sample(range(in_use * pages), in_use * pages)
        nowhere = (-1, -(2**31), in_use * pages, 2**31 - 1)
        numbers = [random.choice(nowhere) if random.randrange(8) == 0 else page for page in numbers]
        table = [numbers[i * pages : (i + 1) * pages] for i in range(in_use)]
    entries = random.sample(range(in_use), batch) if with_entries else []
    entries = [random.choice((-1, in_use, 10**6)) if random.randrange(8) == 0 else x for x in entries]
    cu_added = cumulative(batch, 9) if random.randrange(2) else []
    cu_queries = cumulative(batch, 9) if random.randrange(2) else []
    return Case(
        dtype=dtype,
        kv_heads=random.randint(1, 3),
        heads=random.choice((0, 1, 4)),
        head_dim=head_dim,
        head_dim_v=random.randint(1, 80),
        lengths=[random.choice((0, -2, capacity, random.randint(0, capacity))) for _ in range(batch)],
        capacity=capacity,
        page_size=page_size if paged else capacity,
        pages=in_use * pages if paged else in_use,
        entries=entries,
        table=table,
        cu_added=cu_added,
        cu_queries=cu_queries,
        rows=cu_added[-1] + random.choice((0, 3)) if cu_added else random.randint(0, 9),
        rows_q=cu_queries[-1] + random.choice((0, 3)) if cu_queries else random.randint(0, 9),
        rotary_type=random.choice(ROTARY_TYPES),
        rotary_dim=random.choice((0, 2, head_dim, 2 * random.randint(1, head_dim // 2))),
        interleaved=bool(random.randrange(2)),
        per_position=bool(random.randrange(2)),
        counters=[random.randint(1, 9) for _ in range(random.choice((1, 1, 40, 3000)))],
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_new_rows_and_queries_are_where_they_belong_and_nothing_else_is_written(
    decode_host: Host, dtype: torch.dtype
) -> None:
    random.seed(0)
    torch.manual_seed(0)
    cases = [a_case(dtype) for _ in range(150)]
    for case, answer in zip(cases, decode_host([case.request() for case in cases]), strict=True):
        for name, expected in case.expected().items():
            assert answer[name] == expected, (name, case)
