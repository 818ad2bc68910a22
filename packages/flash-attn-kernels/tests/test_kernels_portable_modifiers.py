"""What changes the scores on the portable path: each modifier acts, has its gradient, and keeps to its own limits."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from flash_attn_kernels import blockwise, flash_attn_func, flash_attn_varlen_func, portable
from flash_attn_kernels.inputs import AttentionInputs, ScoreModifiers
from flash_attn_kernels.options import AttentionOptions
from flash_attn_kernels.philox import draw_seed_and_offset, keep_mask
from flash_attn_kernels.reference import attention_reference
from flash_attn_kernels.testing import assert_within_reference_error
from torch import Tensor

INF = float("inf")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks in small problems, of sizes that divide nothing."""
    monkeypatch.setattr(blockwise, "QUERY_BLOCK", 13)
    monkeypatch.setattr(blockwise, "KEY_BLOCK", 17)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(seqlen_q: int, seqlen_k: int, heads: int = 4, kv_heads: int = 2) -> list[Tensor]:
    shapes = ((2, seqlen_q, heads, 8), (2, seqlen_k, kv_heads, 8), (2, seqlen_k, kv_heads, 12))
    return [randn(*shape, seed=i) for i, shape in enumerate(shapes)]


def packed_inputs(lengths_q: list[int], lengths_k: list[int]) -> tuple[list[Tensor], Tensor, Tensor]:
    shapes = ((sum(lengths_q), 4, 8), (sum(lengths_k), 2, 8), (sum(lengths_k), 2, 12))
    cu_q, cu_k = (
        torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        for lengths in (lengths_q, lengths_k)
    )
    return [randn(*shape, seed=i) for i, shape in enumerate(shapes)], cu_q, cu_k


def outputs_and_gradients(attend: Any, leaves: list[Tensor]) -> list[Tensor]:
    """out, lse and the gradients of a random functional of both."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    out, lse = attend(*leaves)
    upstream = [randn(*x.shape, seed=7 + i).to(x.dtype) for i, x in enumerate((out, lse))]
    return [out.detach(), lse.detach(), *torch.autograd.grad([out, lse], leaves, upstream)]


def assert_all_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11, msg=lambda m, i=i: f"result {i}: {m}")


# Every option acts

CHANGES: dict[str, dict[str, Any]] = {
    "scale": {"softmax_scale": 0.1},
    "causal": {"causal": True},
    "window": {"window_size": (5, 5)},
    "softcap": {"softcap": 0.7},
    "dropout": {"dropout_p": 0.2},
    "bias": {"attn_bias": randn(1, 1, 20, 30)},
    "mask": {"attn_mask": randn(20, 30) < 0},
    "key padding": {"key_padding_mask": randn(2, 30) < 0},
    "shared slopes": {"alibi_slopes": randn(4)},
    "slopes": {"alibi_slopes": randn(2, 4)},
    "sink": {"learnable_sink": randn(4)},
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_option_changes_the_output(name: str) -> None:
    tensors = inputs(20, 30)
    plain = flash_attn_func(*tensors)
    assert not torch.allclose(flash_attn_func(*tensors, **CHANGES[name]), plain, atol=1e-3)
    cu_q, cu_k = (torch.arange(3, dtype=torch.int32) * n for n in (20, 30))
    packed = [x.flatten(0, 1) for x in tensors]
    out = flash_attn_varlen_func(*packed, cu_q, cu_k, 20, 30, **CHANGES[name])
    assert not torch.allclose(out, plain.flatten(0, 1), atol=1e-3)


@pytest.mark.parametrize("options", [{"causal": True}, {"window_size": (4, 4)}], ids=str)
def test_the_alignment_changes_the_output_where_lengths_differ(options: dict[str, Any]) -> None:
    for lengths in ((20, 30), (30, 20)):
        tensors = inputs(*lengths)
        bottom_right, top_left = (
            flash_attn_func(*tensors, causal_alignment=name, **options)
            for name in ("bottom-right", "top-left")
        )
        assert not torch.allclose(bottom_right, top_left, atol=1e-3)
    tensors, slopes = inputs(20, 30), randn(4)
    bottom_right, top_left = (
        flash_attn_func(*tensors, alibi_slopes=slopes, causal_alignment=name)
        for name in ("bottom-right", "top-left")
    )
    assert not torch.allclose(bottom_right, top_left, atol=1e-3)


@pytest.mark.parametrize("side", ["q", "k"])
def test_seqused_changes_the_output(side: str) -> None:
    tensors, cu_q, cu_k = packed_inputs([9, 20], [9, 20])
    used = {f"seqused_{side}": torch.tensor([4, 20], dtype=torch.int32)}
    plain = flash_attn_varlen_func(*tensors, cu_q, cu_k, 20, 20)
    out = flash_attn_varlen_func(*tensors, cu_q, cu_k, 20, 20, **used)
    assert not torch.allclose(out[:9], plain[:9], atol=1e-3) and torch.equal(out[9:], plain[9:])


# Gradients


@pytest.mark.parametrize("full", list(itertools.product([False, True], repeat=4)), ids=str)
def test_all_broadcast_patterns_of_the_bias(full: tuple[bool, ...]) -> None:
    shape = [size if is_full else 1 for size, is_full in zip((2, 4, 31, 40), full, strict=True)]
    leaves = [*inputs(31, 40), randn(*shape, seed=5)]
    options = AttentionOptions(8**-0.5, window_right=0, softcap=2.0)

    def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return flash_attn_func(q, k, v, causal=True, softcap=2.0, attn_bias=bias, return_lse=True)

    def reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return attention_reference(q, k, v, options, modifiers=ScoreModifiers(attn_bias=bias))[:2]

    assert_all_close(outputs_and_gradients(ours, leaves), outputs_and_gradients(reference, leaves))


@pytest.mark.parametrize("bias_shape", [(1, 2, 4, 5), (2, 1, 1, 5), (1, 1, 4, 1)])
def test_gradcheck_of_everything(bias_shape: tuple[int, ...]) -> None:
    shapes = [(2, 4, 2, 3), (2, 5, 1, 3), (2, 5, 1, 2), bias_shape, (2, 2), (2,)]
    leaves = [randn(*shape, seed=i) for i, shape in enumerate(shapes)]
    mask, padding = randn(1, 2, 4, 5, seed=8) < 1.0, randn(2, 5, seed=9) < 1.0

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, slopes: Tensor, sink: Tensor) -> Any:
        torch.manual_seed(4)
        return flash_attn_func(
            q, k, v, dropout_p=0.2, causal=True, softcap=2.0, alibi_slopes=slopes, attn_bias=bias, attn_mask=mask,
            key_padding_mask=padding, learnable_sink=sink, return_lse=True,
        )  # fmt: skip

    assert torch.autograd.gradcheck(attend, [x.requires_grad_() for x in leaves])


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    modifiers = ScoreModifiers(randn(1, 1, 9, 9), alibi_slopes=randn(1, 4), learnable_sink=randn(4))
    call = AttentionInputs(*inputs(9, 9), AttentionOptions(0.5), modifiers)
    out, lse = portable.forward(call)
    names = ("attn_bias", "alibi_slopes", "learnable_sink")
    for wanted in itertools.product([False, True], repeat=3):
        needs = {f"needs_{name}": want for name, want in zip(names, wanted, strict=True)}
        gradients = portable.backward(call, out, lse, torch.ones_like(out), None, **needs)
        assert tuple(getattr(gradients, name) is not None for name in names) == wanted
    nothing = AttentionInputs(call.q, call.k, call.v, call.options)
    needs = {f"needs_{name}": True for name in names}
    gradients = portable.backward(nothing, out, lse, torch.ones_like(out), None, **needs)
    assert all(getattr(gradients, name) is None for name in names)


# Numbers far from zero


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_sink", [False, True])
def test_strongly_negative_lse(dtype: torch.dtype, with_sink: bool) -> None:
    """exp(lse) underflows even in fp32 below -88.7: nothing may depend on it."""
    leaves = [x.to(dtype) for x in [*inputs(20, 30), torch.full((1, 4, 20, 30), -300.0)]]
    leaves += [torch.full((4,), -299.0, dtype=dtype)] if with_sink else []

    def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sink: Tensor | None = None) -> Any:
        return flash_attn_func(q, k, v, attn_bias=bias, learnable_sink=sink, return_lse=True)

    def reference(compute_dtype: torch.dtype) -> Any:
        def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sink: Tensor | None = None) -> Any:
            modifiers = ScoreModifiers(attn_bias=bias, learnable_sink=sink)
            return attention_reference(
                q, k, v, AttentionOptions(8**-0.5), modifiers=modifiers, compute_dtype=compute_dtype
            )[:2]

        return attend

    actual = outputs_and_gradients(ours, leaves)
    exact = outputs_and_gradients(reference(torch.float64), [x.double() for x in leaves])
    plain = outputs_and_gradients(reference(dtype), leaves)
    assert (exact[1] < -250).all()
    for i, results in enumerate(zip(actual, exact, plain, strict=True)):
        factor = 2.0 if i < 2 else 3.0
        assert_within_reference_error(*results, factor=factor, name=f"result {i}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source", ["scale", "bias", "sink"])
def test_large_logits(dtype: torch.dtype, source: str) -> None:
    """±1e4 leaves one key, or the sink, with all the weight; nothing overflows."""
    q, k, v = (x.to(dtype) for x in inputs(20, 30))
    bias = 1e4 * randn(1, 4, 20, 30, seed=5).sign() if source == "bias" else torch.zeros(1, 4, 1, 1)
    sink = torch.tensor([1e4, -1e4, 0.0, 1e4]) if source == "sink" else torch.zeros(4)
    scale = 3e3 if source == "scale" else 0.3
    leaves = [q, k, v, bias.to(dtype), sink.to(dtype)]

    def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sink: Tensor) -> Any:
        return flash_attn_func(
            q, k, v, softmax_scale=scale, attn_bias=bias, learnable_sink=sink, return_lse=True
        )

    def reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sink: Tensor) -> Any:
        modifiers = ScoreModifiers(attn_bias=bias, learnable_sink=sink)
        return attention_reference(q, k, v, AttentionOptions(scale), modifiers=modifiers)[:2]

    actual = outputs_and_gradients(ours, leaves)
    assert all(x.isfinite().all() for x in actual)
    if dtype == torch.float64:
        expected = outputs_and_gradients(reference, leaves)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * scale)


# Rows and keys that take no part

HIDE_ALL: dict[str, dict[str, Any]] = {
    "mask": {"attn_mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool)},
    "minus infinity": {"attn_bias": torch.full((1, 1, 1, 30), -INF, dtype=torch.float32)},
    "padding": {"key_padding_mask": torch.zeros(2, 30, dtype=torch.bool)},
    "window": {"window_size": (0, 0), "causal_alignment": "top-left", "attn_mask": ~torch.eye(20, 30).bool()},
}


@pytest.mark.parametrize("name", HIDE_ALL)
@pytest.mark.parametrize("with_sink", [False, True])
def test_rows_that_see_nothing(name: str, with_sink: bool) -> None:
    leaves = [x.requires_grad_() for x in (*inputs(20, 30), randn(4, seed=6))]
    sink = leaves[3] if with_sink else None
    out, lse = flash_attn_func(*leaves[:3], learnable_sink=sink, return_lse=True, **HIDE_ALL[name])
    expected = leaves[3].detach() if with_sink else torch.full((4,), -INF)
    assert (out == 0).all() and torch.equal(lse, expected.to(lse.dtype).reshape(1, 4, 1).expand(2, 4, 20))
    # What is computed from -inf has a NaN gradient easily, and this row's LSE is a constant.
    dlse = torch.full_like(lse, 1.0 if with_sink else float("nan"))
    gradients = torch.autograd.grad([out, lse], leaves, [torch.ones_like(out), dlse], allow_unused=True)
    assert all((gradient == 0).all() for gradient in gradients[:3] if gradient is not None)
    if with_sink:
        torch.testing.assert_close(gradients[3], torch.full_like(leaves[3], 2 * 20.0))


def test_a_sink_of_minus_infinity_is_no_sink() -> None:
    tensors = inputs(20, 30)
    sink = torch.full((4,), -INF, dtype=torch.float64)
    mask = randn(1, 1, 20, 1, seed=6) < 0  # some rows see nothing
    ours = outputs_and_gradients(
        lambda q, k, v: flash_attn_func(q, k, v, attn_mask=mask, learnable_sink=sink, return_lse=True),
        tensors,
    )
    plain = outputs_and_gradients(
        lambda q, k, v: flash_attn_func(q, k, v, attn_mask=mask, return_lse=True), tensors
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("garbage", [float("nan"), INF, -INF])
@pytest.mark.parametrize("packed", [False, True])
def test_padded_keys_may_hold_anything(garbage: float, packed: bool) -> None:
    q, k, v = inputs(20, 30)
    real = randn(2, 30, seed=3) < 0.5
    cu_q, cu_k = (torch.arange(3, dtype=torch.int32) * n for n in (20, 30))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        options = {"causal": True, "softcap": 2.0, "key_padding_mask": real, "return_lse": True}
        if not packed:
            return flash_attn_func(q, k, v, **options)
        return flash_attn_varlen_func(*(x.flatten(0, 1) for x in (q, k, v)), cu_q, cu_k, 20, 30, **options)

    hidden = ~real[:, :, None, None]
    clean = outputs_and_gradients(attend, [q, k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)])
    poisoned = outputs_and_gradients(
        attend, [q, k.masked_fill(hidden, garbage), v.masked_fill(hidden, garbage)]
    )
    assert all(torch.equal(a, b) for a, b in zip(poisoned, clean, strict=True))
    assert (poisoned[3][~real] == 0).all() and (poisoned[4][~real] == 0).all()


def test_a_nan_bias_where_nothing_is_visible_changes_nothing() -> None:
    bias, mask = randn(1, 1, 20, 30, seed=5), randn(1, 1, 20, 30, seed=6) < 0.5

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Any:
        return flash_attn_func(q, k, v, attn_bias=bias, attn_mask=mask, return_lse=True)

    clean = outputs_and_gradients(attend, [*inputs(20, 30), bias])
    poisoned = outputs_and_gradients(attend, [*inputs(20, 30), bias.masked_fill(~mask, float("nan"))])
    assert all(torch.equal(a, b) for a, b in zip(poisoned, clean, strict=True))


# Packed calls


def test_positions_past_the_end_of_a_modifier() -> None:
    """Past a bias the bias is 0 and past a mask nothing is visible; a dimension of size 1 has no end."""
    lengths_q, lengths_k = [30, 3], [40, 5]
    tensors, cu_q, cu_k = packed_inputs(lengths_q, lengths_k)
    bias, mask, padding = (
        randn(2, 1, 20, 25, seed=5),
        randn(1, 4, 1, 38, seed=6) < 1.0,
        randn(2, 35, seed=7) < 1.0,
    )

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, **others: Tensor) -> Any:
        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, 30, 40, attn_bias=bias, return_lse=True, **others)

    others = {"attn_mask": mask, "key_padding_mask": padding}
    short = outputs_and_gradients(lambda *x: attend(*x, **others), [*tensors, bias])
    fitted = {
        "attn_mask": torch.nn.functional.pad(mask, (0, 2)),
        "key_padding_mask": torch.nn.functional.pad(padding, (0, 5)),
    }
    long_bias = torch.nn.functional.pad(bias, (0, 15, 0, 10))
    long = outputs_and_gradients(lambda *x: attend(*x, **fitted), [*tensors, long_bias])
    assert all(torch.equal(a, b) for a, b in zip(short[:5], long[:5], strict=True))
    assert torch.equal(short[5], long[5][:, :, :20, :25])
    assert (short[5][1, :, 3:] == 0).all() and (short[5][1, :, :, 5:] == 0).all()


def test_pages_collect_the_gradients_of_everyone_who_reads_them() -> None:
    """Two sequences share a page, and one reads it twice; k is transposed, so its pages are no plain rows."""
    q = randn(9, 4, 8)
    pages_k, pages_v = randn(3, 2, 6, 8, seed=1).transpose(1, 2), randn(3, 6, 2, 12, seed=2)
    cu_q = torch.tensor([0, 4, 9], dtype=torch.int32)
    cu_k = torch.tensor([0, 16, 27], dtype=torch.int32)
    table = torch.tensor([[2, 0, 2], [0, 1, -1]], dtype=torch.int32)

    def paged(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flash_attn_varlen_func(
            q, k, v, cu_q, cu_k, 5, 16, causal=True, block_table=table, return_lse=True
        )

    def gathered(q: Tensor, k: Tensor, v: Tensor) -> Any:
        first, second = ([x[[2, 0, 2]].flatten(0, 1)[:16], x[[0, 1]].flatten(0, 1)[:11]] for x in (k, v))
        return flash_attn_varlen_func(
            q, torch.cat(first), torch.cat(second), cu_q, cu_k, 5, 16, causal=True, return_lse=True
        )

    leaves = [q, pages_k, pages_v]
    assert_all_close(outputs_and_gradients(paged, leaves), outputs_and_gradients(gathered, leaves))


# Probabilities


def test_a_dropped_probability_has_its_sign_bit_set_even_if_it_is_zero() -> None:
    tensors = inputs(33, 21)
    torch.manual_seed(7)
    options = {"dropout_p": 0.25, "window_size": (3, 0)}
    probabilities = flash_attn_func(*tensors, return_attn_probs=True, **options)[2]
    torch.manual_seed(7)
    heads = torch.arange(8).reshape(2, 4, 1, 1)
    seed_and_offset = draw_seed_and_offset(torch.device("cpu"))
    kept = keep_mask(seed_and_offset, heads, torch.arange(33), torch.arange(21), 0.25)
    assert (probabilities == 0).any() and torch.equal(probabilities.signbit(), ~kept)


def test_packed_probabilities_are_those_of_each_sequence() -> None:
    lengths_q, lengths_k, used_k = [3, 0, 17, 8], [5, 7, 20, 30], [5, 0, 19, 2]
    tensors, cu_q, cu_k = packed_inputs(lengths_q, lengths_k)
    bias, slopes, sink = randn(4, 4, 1, 30, seed=5), randn(4, 4, seed=6), randn(4, seed=7)
    torch.manual_seed(3)
    _, lse, probabilities = flash_attn_varlen_func(
        *tensors, cu_q, cu_k, 17, 30, dropout_p=0.3, causal=True, attn_bias=bias, alibi_slopes=slopes,
        learnable_sink=sink, seqused_k=torch.tensor(used_k, dtype=torch.int32), return_attn_probs=True,
    )  # fmt: skip
    torch.manual_seed(3)
    seed_and_offset = draw_seed_and_offset(torch.device("cpu"))
    assert probabilities.shape == (4, 4, 17, 19) and probabilities.dtype == torch.float64
    options = AttentionOptions(8**-0.5, window_right=0)
    for b, (Sq, Sk) in enumerate(zip(lengths_q, used_k, strict=True)):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b] + Sk)
        one = [x[part].unsqueeze(0) for x, part in zip(tensors, (rows, keys, keys), strict=True)]
        modifiers = ScoreModifiers(
            bias[b : b + 1, ..., :Sk], alibi_slopes=slopes[b : b + 1], learnable_sink=sink
        )
        reference = attention_reference(*one, options, modifiers=modifiers)
        heads = b * 4 + torch.arange(4).reshape(1, 4, 1, 1)
        kept = keep_mask(seed_and_offset, heads, torch.arange(Sq), torch.arange(Sk), 0.3)[0]
        expected = torch.where(kept, reference.probabilities[0], -reference.probabilities[0])
        torch.testing.assert_close(probabilities[b, :, :Sq, :Sk], expected)
        torch.testing.assert_close(lse[:, rows], reference.lse[0])
        assert (probabilities[b, :, Sq:] == 0).all() and (probabilities[b, :, :, Sk:] == 0).all()


def test_probabilities_where_there_are_no_sequences() -> None:
    tensors, cu_q, cu_k = packed_inputs([], [])
    assert flash_attn_varlen_func(*tensors, cu_q, cu_k, 0, 0, return_attn_probs=True)[2].shape == (0, 4, 0, 0)
