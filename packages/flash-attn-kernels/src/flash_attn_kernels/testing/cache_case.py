"""Histories of a key-value cache: sequences come in chunks, each chunk attends, and the whole must be plain attention.

The chunks are random, and so is which sequences a call is about, in which order, packed or dense, and whether the
append is a call of its own. All memory that no key was written to holds NaN, around the caches too, and must keep its
bits; so do the keys of the left padding.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..inputs import ScoreModifiers
from ..kvcache import append_kv, flash_attn_with_kvcache
from ..options import AttentionOptions, make_options
from ..reference import attention_reference
from .tolerance import assert_within_reference_error

_SPARE = 2  # rows or pages that no sequence uses, before and after the others
_SPARE_ELEMENTS = 3  # after every head


@dataclass(frozen=True)
class CacheCase:
    """What describes a history; every field has an ordinary value to start from."""

    dtype: torch.dtype = torch.float32
    heads: tuple[int, int] = (4, 2)
    head_dims: tuple[int, int] = (16, 16)  # of q and k, and of v
    lengths: tuple[int, ...] = (23, 9, 16)
    page_size: int | None = None  # None is a contiguous cache
    shared_pages: int = 0  # at the beginning of all sequences
    batch_idx: bool = False
    leftpad: bool = False
    rotary_dim: int = 0
    interleaved: bool = True
    window_left: int = -1  # the right side is causal
    softcap: float = 0.0
    alibi: str | None = None  # "h" or "bh"
    sink: bool = False
    num_splits: int = 0
    batch_invariant: bool = False
    dense: bool = False  # calls without cu_seqlens, on sequences that get equally many tokens
    most_new: int = 12  # in one call
    seed: int = 0

    @property
    def options(self) -> AttentionOptions:
        return make_options(
            head_dim=self.head_dims[0],
            softmax_scale=None,
            causal=True,
            window_size=(self.window_left, -1),
            softcap=self.softcap,
            dropout_p=0.0,
            deterministic=False,
        )


@dataclass
class _History:
    """Everything that a history needs: sequences whole, the caches, and how far each sequence has come."""

    case: CacheCase
    device: torch.device
    q: list[Tensor] = field(default_factory=list)  # (length, heads, head_dim) of each sequence
    k: list[Tensor] = field(default_factory=list)
    v: list[Tensor] = field(default_factory=list)
    leftpads: list[int] = field(default_factory=list)
    done: list[int] = field(default_factory=list)
    modifiers: dict[str, Tensor] = field(default_factory=dict)
    rotary: dict[str, Any] = field(default_factory=dict)
    out: list[Tensor] = field(default_factory=list)
    lse: list[Tensor] = field(default_factory=list)


def check_cache_history(case: CacheCase, device: torch.device | str = "cpu", *, strict: bool = False) -> None:
    """Assert that all chunks together equal the definition by the tolerance law, and that nothing else was written."""
    outs, lses, history = run_cache_history(case, device, strict=strict)
    for b in range(len(case.lengths)):
        exact_out, exact_lse = _reference(history, b, torch.float64)
        plain_out, plain_lse = _reference(history, b, case.dtype)
        begin = _first_position(case, b)
        name = f"sequence {b}"
        assert_within_reference_error(outs[b], exact_out[begin:], plain_out[begin:], name=f"out of {name}")
        assert_within_reference_error(
            lses[b], exact_lse[:, begin:], plain_lse[:, begin:], name=f"lse of {name}"
        )


def run_cache_history(
    case: CacheCase, device: torch.device | str = "cpu", *, strict: bool = False
) -> tuple[list[Tensor], list[Tensor], _History]:
    """out (tokens, H, Dv) and lse (H, tokens) of each sequence's tokens that were appended, in order."""
    history = _make_history(case, torch.device(device))
    chance = random.Random(case.seed)
    memory, caches, places, slots = _make_caches(history, chance)
    expected = [x.clone() for x in memory]
    while any(done < length for done, length in zip(history.done, case.lengths, strict=True)):
        members, counts = _choose_chunks(history, chance)
        before = list(history.done)
        _run_chunk(history, chance, caches, places, members, counts, strict)
        _write_expected(history, memory, expected, slots, before)
        for x, y in zip(memory, expected, strict=True):
            # As bits, since NaN differs from itself.
            assert torch.equal(_bits(x), _bits(y)), "the cache differs from what was to be written"
    return history.out, history.lse, history


def _bits(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def _first_position(case: CacheCase, b: int) -> int:
    """Where a sequence begins to append: behind pages that the first one has written for it."""
    return 0 if b == 0 or case.page_size is None else case.shared_pages * case.page_size


def _make_history(case: CacheCase, device: torch.device) -> _History:
    generator = torch.Generator(device=device).manual_seed(case.seed)
    chance = random.Random(case.seed + 1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    (H, Hk), (D, Dv) = case.heads, case.head_dims
    history = _History(case, device)
    shared = 0 if case.page_size is None else case.shared_pages * case.page_size
    for b, length in enumerate(case.lengths):
        history.q.append(randn(length, H, D).to(case.dtype))
        history.k.append(randn(length, Hk, D).to(case.dtype))
        history.v.append(randn(length, Hk, Dv).to(case.dtype))
        history.leftpads.append(chance.randint(0, min(length, 6)) if case.leftpad else 0)
        history.done.append(_first_position(case, b))
        history.out.append(randn(0, H, Dv).to(case.dtype))
        history.lse.append(randn(H, 0))
    for b in range(len(case.lengths)):
        if b > 0:
            history.k[b][:shared], history.v[b][:shared] = history.k[0][:shared], history.v[0][:shared]
    for b, leftpad in enumerate(history.leftpads):
        if shared == 0:
            history.k[b][:leftpad], history.v[b][:leftpad] = torch.nan, torch.nan
    if case.alibi is not None:
        shape = (H,) if case.alibi == "h" else (len(case.lengths), H)
        history.modifiers["alibi_slopes"] = 0.05 + 0.3 * randn(*shape).abs()
    if case.sink:
        history.modifiers["learnable_sink"] = randn(H)
    if case.rotary_dim:
        # As many positions as the widest block table has, with three pages to spare.
        positions = max(case.lengths) + 3 * (case.page_size or 1)
        half = case.rotary_dim // 2
        frequency = 100.0 ** -(torch.arange(half, device=device) / half)
        angles = torch.arange(positions, device=device).unsqueeze(1) * frequency
        history.rotary = {
            "rotary_cos": angles.cos(),
            "rotary_sin": angles.sin(),
            "rotary_interleaved": case.interleaved,
        }
    return history


def _make_caches(
    history: _History, chance: random.Random
) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor], list[list[tuple[int, int]]]]:
    """The memory that holds the caches, the caches, the tensors that say where sequences lie, and the slots of each."""
    case, lengths = history.case, history.case.lengths
    batch, Hk = len(lengths), case.heads[1]
    places: dict[str, Tensor] = {}
    order = chance.sample(range(batch + 1), batch) if case.batch_idx else list(range(batch))
    if case.batch_idx:
        places["cache_batch_idx"] = _int32(order, history.device)
    if case.page_size is None:
        rows, width = (batch + 1 if case.batch_idx else batch), max(lengths) + 3
        slots = [[(order[b], t) for t in range(lengths[b])] for b in range(batch)]
    else:
        width = case.page_size
        needed = [-(-length // width) for length in lengths]
        rows = sum(needed) + 1
        numbers = chance.sample(range(rows), rows)
        table = [[10**9] * (max(needed) + 2) for _ in range(batch + 1 if case.batch_idx else batch)]
        for b, count in enumerate(needed):
            own = [numbers.pop() for _ in range(count)]
            if b > 0:
                own[: case.shared_pages] = table[order[0]][: case.shared_pages]
            table[order[b]][:count] = own
        places["block_table"] = _int32(table, history.device)
        slots = [[(table[order[b]][t // width], t % width) for t in range(lengths[b])] for b in range(batch)]
    memory, caches = [], []
    for head_dim in case.head_dims:
        shape = (rows + 2 * _SPARE, width, Hk, head_dim + _SPARE_ELEMENTS)
        memory.append(torch.full(shape, torch.nan, dtype=case.dtype, device=history.device))
        caches.append(memory[-1][_SPARE:-_SPARE, :, :, :head_dim])
    return memory, caches, places, slots


def _int32(values: Any, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def _choose_chunks(history: _History, chance: random.Random) -> tuple[list[int], list[int]]:
    """The sequences of the next call, in its order, and the new tokens of each."""
    case = history.case
    left = [length - done for done, length in zip(history.done, case.lengths, strict=True)]
    everyone = list(range(len(left)))
    if case.shared_pages and history.done[0] < case.shared_pages * (case.page_size or 0):
        # Nobody may look at the shared pages before the first sequence has written them.
        members, counts = [0], [min(left[0], chance.randint(1, case.most_new))]
        if case.dense and case.batch_idx:
            return members, counts
        return everyone, [counts[0] if b == 0 else 0 for b in everyone]
    if not case.batch_idx:
        if case.dense:
            return everyone, [min(*left, case.most_new)] * len(left) if min(left) else left
        return everyone, [min(n, chance.randint(0, case.most_new)) for n in left]
    members = chance.sample(everyone, chance.randint(1, len(everyone)))
    if case.dense:
        members = [b for b in members if left[b]] or [max(everyone, key=lambda b: left[b])]
        return members, [chance.randint(1, min(case.most_new, *(left[b] for b in members)))] * len(members)
    return members, [min(left[b], chance.randint(0, case.most_new)) for b in members]


def _run_chunk(
    history: _History,
    chance: random.Random,
    caches: list[Tensor],
    places: dict[str, Tensor],
    members: list[int],
    counts: list[int],
    strict: bool,
) -> None:
    case, device = history.case, history.device
    lengths = [history.done[b] for b in members]
    rows = [slice(length, length + n) for length, n in zip(lengths, counts, strict=True)]
    q, k, v = (
        torch.cat([x[b][part] for b, part in zip(members, rows, strict=True)])
        for x in (history.q, history.k, history.v)
    )
    layout: dict[str, Any] = {
        name: x[members] if name == "cache_batch_idx" else x for name, x in places.items()
    }
    packing: dict[str, Any] = {}
    if case.dense and len(set(counts)) == 1:
        q, k, v = (x.unflatten(0, (len(members), -1)) for x in (q, k, v))
    else:
        ends = [0]
        for n in counts:
            ends.append(ends[-1] + n)
        packing["cu_seqlens_q"] = _int32(ends, device)
        # Rows of no sequence may hold anything.
        q, k, v = (torch.cat([x, x.new_full((3, *x.shape[1:]), torch.nan)]) for x in (q, k, v))
    arguments: dict[str, Any] = {
        **history.modifiers,
        "causal": True,
        "window_size": (case.window_left, -1),
        "softcap": case.softcap,
        "num_splits": case.num_splits,
        "batch_invariant": case.batch_invariant,
        "return_softmax_lse": True,
        "strict": strict,
    }
    if case.leftpad:
        known = [min(history.leftpads[b], rows[m].stop) for m, b in enumerate(members)]
        arguments["cache_leftpad"] = _int32(known, device)
    if case.alibi == "bh":
        arguments["alibi_slopes"] = arguments["alibi_slopes"][members]
    cache_seqlens = _int32(lengths, device)
    k_cache, v_cache = caches
    validate = chance.random() < 0.5
    if chance.random() < 0.5:
        arguments |= {"k": k, "v": v, **history.rotary}
    else:
        rotated = append_kv(
            k_cache,
            v_cache,
            k,
            v,
            cache_seqlens,
            q=q if history.rotary else None,
            validate=validate,
            strict=strict,
            **history.rotary,
            **layout,
            **packing,
        )
        q = q if rotated is None else rotated
        cache_seqlens = cache_seqlens + _int32(counts, device)
    out, lse = flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=cache_seqlens, validate=validate, **layout, **packing, **arguments
    )
    if not packing:
        out, lse = out.flatten(0, 1), lse.transpose(0, 1).flatten(1, 2)
    else:
        assert (out[sum(counts) :] == 0).all() and (lse[:, sum(counts) :] == float("-inf")).all()
    begin = 0
    for b, n in zip(members, counts, strict=True):
        history.out[b] = torch.cat([history.out[b], out[begin : begin + n]])
        history.lse[b] = torch.cat([history.lse[b].to(lse.dtype), lse[:, begin : begin + n]], dim=1)
        history.done[b] += n
        begin += n


def _write_expected(
    history: _History,
    memory: list[Tensor],
    expected: list[Tensor],
    slots: list[list[tuple[int, int]]],
    before: list[int],
) -> None:
    """What the caches must hold now. Rotated keys are taken as they are: what comes out of them is judged."""
    new_tokens = (memory[0], None) if history.case.rotary_dim else (None, None)
    for b, (begin, end) in enumerate(zip(before, history.done, strict=True)):
        for t in range(begin, end):
            row, slot = slots[b][t][0] + _SPARE, slots[b][t][1]
            for x, new, actual, head_dim in zip(
                expected, (history.k, history.v), new_tokens, history.case.head_dims, strict=True
            ):
                x[row, slot, :, :head_dim] = new[b][t] if actual is None else actual[row, slot, :, :head_dim]


def rotary_by_complex_numbers(x: Tensor, angle: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding of (T, H, D) by angles (T, rotary_dim / 2): pairs as complex numbers, in fp64."""
    half = angle.shape[1]
    turned, rest = x.double()[..., : 2 * half], x.double()[..., 2 * half :]
    pairs = (
        turned.unflatten(-1, (half, 2)) if interleaved else turned.unflatten(-1, (2, half)).transpose(-1, -2)
    )
    numbers = torch.view_as_complex(pairs.contiguous()) * torch.polar(
        torch.ones_like(angle, dtype=torch.float64), angle.double()
    ).unsqueeze(1)
    pairs = torch.view_as_real(numbers)
    turned = pairs.flatten(-2) if interleaved else pairs.transpose(-1, -2).flatten(-2)
    return torch.cat([turned, rest], dim=-1)


def _reference(history: _History, b: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """out (length, H, Dv) and lse (H, length) of the whole sequence by the definition."""
    case = history.case
    q, k, v = history.q[b], history.k[b], history.v[b]
    if case.rotary_dim:
        cos, sin = history.rotary["rotary_cos"], history.rotary["rotary_sin"]
        angle = torch.atan2(sin.double(), cos.double())[: len(q)]
        q, k = (rotary_by_complex_numbers(x, angle, case.interleaved) for x in (q, k))
    # Plain PyTorch attends to what the cache can hold, in its dtype.
    q, k, v = (x.to(torch.float64 if dtype == torch.float64 else case.dtype).unsqueeze(0) for x in (q, k, v))
    slopes = history.modifiers.get("alibi_slopes")
    if slopes is not None:
        slopes = slopes.unsqueeze(0) if slopes.dim() == 1 else slopes[b : b + 1]
    real = torch.arange(k.shape[1], device=history.device) >= history.leftpads[b]
    result = attention_reference(
        q,
        k,
        v,
        case.options,
        modifiers=ScoreModifiers(
            alibi_slopes=slopes,
            learnable_sink=history.modifiers.get("learnable_sink"),
            key_padding_mask=real.unsqueeze(0),
        ),
        compute_dtype=dtype,
    )
    return result.out[0], result.lse[0]
