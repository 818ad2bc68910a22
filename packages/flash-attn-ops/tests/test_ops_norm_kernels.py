"""The norm kernels against float64, with plain torch in the same dtype as the measure of error."""

from __future__ import annotations

import importlib
import itertools
from dataclasses import dataclass, fields, replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from flash_attn_kernels.testing import assert_within_reference_error
from flash_attn_ops.dispatch import explain
from flash_attn_ops.norm import layer_norm, rms_norm, tiles
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("many_norm_programs")]

FP16, FP32 = torch.float16, torch.float32
# Triton's interpreter cuts float32 off where the hardware rounds it to bfloat16; its float16 is right.
BF16 = torch.bfloat16 if torch.cuda.is_available() else FP16


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    is_rms: bool = True
    bias: bool = False
    dtype: torch.dtype = BF16
    weight_dtype: torch.dtype = BF16
    residual_dtype: torch.dtype | None = None
    residual_in_fp32: bool = False
    prenorm: bool = False
    eps: float = 1e-5
    x1_dtype: torch.dtype | None = None
    weight1: bool = False
    bias1: bool = False
    dropout_p: float = 0.0
    rowscale: bool = False
    layerscale: bool = False
    zero_centered_weight: bool = False
    out_dtype: torch.dtype | None = None

    def __str__(self) -> str:
        changed = [field for field in fields(self)[1:] if getattr(self, field.name) != field.default]
        words = [f"{field.name}={getattr(self, field.name)}" for field in changed]
        return (
            "x".join(map(str, self.shape)) + " " + " ".join(words).replace("torch.", "").replace("=True", "")
        )


SMALL = [
    Case((7, 64)),
    Case((7, 64), is_rms=False, bias=True),
    Case((2, 3, 100), is_rms=False, bias=True, weight_dtype=FP32),
    Case((2, 3, 100), bias=True, weight_dtype=FP32, prenorm=True, residual_dtype=BF16),
    Case((5, 1), is_rms=False, bias=True, dtype=FP32, weight_dtype=FP32),
    Case((5, 1), dtype=FP32, weight_dtype=FP32, eps=1e-2),
    Case((129, 257), dtype=FP32, weight_dtype=FP32, residual_dtype=FP32, eps=1e-2),
    Case((9, 96), is_rms=False, residual_dtype=FP32, prenorm=True),
    Case((9, 96), is_rms=False, bias=True, residual_dtype=BF16, residual_in_fp32=True, prenorm=True),
    Case((9, 96), prenorm=True, residual_in_fp32=True),
    Case((9, 96), prenorm=True),
    Case((3, 80), is_rms=False, bias=True, dtype=FP16, weight_dtype=FP16, residual_dtype=FP16),
]
CHOICES = {
    "is_rms": (False, True),
    "bias": (True, False),
    "residual_dtype": (BF16, FP32, None),
    "residual_in_fp32": (True, False),
    "prenorm": (True, False),
    "x1_dtype": (BF16, FP32, None),
    "weight1": (True, False),
    "bias1": (True, False),
    "dropout_p": (0.25, 0.0),
    "rowscale": (True, False),
    "layerscale": (True, False),
    "zero_centered_weight": (True, False),
    "out_dtype": (FP32, None),
}


def pairwise() -> list[Case]:
    """Few cases in which every two values of two options meet: each case takes, option by option, the value that
    meets most values it has not met yet."""
    pairs = {
        frozenset({(a, x), (b, y)})
        for a, b in itertools.combinations(CHOICES, 2)
        for x in CHOICES[a]
        for y in CHOICES[b]
    }
    cases = []
    while pairs:
        chosen = sorted(min(pairs, key=lambda pair: str(sorted(map(str, pair)))), key=str)
        for option, values in CHOICES.items():
            if option not in dict(chosen):
                news = [sum(frozenset({(option, v), item}) in pairs for item in chosen) for v in values]
                chosen.append((option, values[news.index(max(news))]))
        pairs -= {frozenset(pair) for pair in itertools.combinations(chosen, 2)}
        cases.append(Case((5, 52), **dict(chosen)))
    return [replace(case, bias1=case.bias1 and case.weight1) for case in cases]


PAIRWISE = pairwise()
EVERYTHING = Case(
    (1, 1),
    is_rms=False,
    bias=True,
    residual_dtype=FP32,
    prenorm=True,
    x1_dtype=BF16,
    weight1=True,
    bias1=True,
    dropout_p=0.3,
    rowscale=True,
    layerscale=True,
)
LARGE = [
    Case((517, 1024), is_rms=False, bias=True),
    Case((517, 3000)),
    Case((1031, 4096), residual_dtype=BF16, prenorm=True),
    Case((301, 5120), is_rms=False, bias=True),
    Case((301, 8192), residual_dtype=FP32, prenorm=True),
    Case((203, 16384), is_rms=False, bias=True),
    Case((203, 16384), is_rms=False, bias=True, residual_dtype=BF16, prenorm=True, dropout_p=0.1),
    Case((203, 16384)),
    Case((67, 32768)),
    Case((67, 33000), is_rms=False, bias=True),
    Case((67, 65536)),
    Case((5, 262144), is_rms=False, bias=True, residual_dtype=BF16, prenorm=True, dropout_p=0.1),
    Case(
        (301, 8192), is_rms=False, bias=True, dtype=FP32, weight_dtype=FP32, residual_dtype=FP32, prenorm=True
    ),
    *(replace(EVERYTHING, shape=shape) for shape in ((300, 768), (301, 2048), (150, 4096), (70, 8192))),
]


def inputs(case: Case, device: str) -> dict[str, Tensor | None]:
    """Rows with a mean of about 1 and weights of about 1 (or 0, if that stands for it): neither is lost unseen."""
    size = case.shape[-1:]
    centre = 0.0 if case.zero_centered_weight else 1.0

    def draw(
        present: object, shape: tuple[int, ...], dtype: torch.dtype | None, centre: float
    ) -> Tensor | None:
        return (torch.randn(shape, device=device) + centre).to(dtype) if present else None

    return {
        "x": draw(True, case.shape, case.dtype, 1.0),
        "weight": draw(True, size, case.weight_dtype, centre),
        "bias": draw(case.bias, size, case.weight_dtype, 0.0),
        "residual": draw(case.residual_dtype, case.shape, case.residual_dtype, 0.0),
        "x1": draw(case.x1_dtype, case.shape, case.x1_dtype, 0.0),
        "weight1": draw(case.weight1, size, case.weight_dtype, centre),
        "bias1": draw(case.bias1, size, case.weight_dtype, 0.0),
        "rowscale": draw(case.rowscale, case.shape[:-1], FP32, 1.0),
        "layerscale": draw(case.layerscale, size, case.weight_dtype, 1.0),
    }


def gradients_of(case: Case, device: str) -> list[Tensor]:
    dtypes = [case.out_dtype or case.dtype] * (1 + case.weight1)
    if case.prenorm:
        dtypes.append(FP32 if case.residual_in_fp32 else case.residual_dtype or case.dtype)
    return [torch.randn(case.shape, device=device).to(dtype) for dtype in dtypes]


def ours(case: Case, **given: Tensor | None) -> list[Tensor]:
    """Outputs, and at the end the two masks."""
    outputs = (rms_norm if case.is_rms else layer_norm)(
        **given,
        eps=case.eps,
        prenorm=case.prenorm,
        residual_in_fp32=case.residual_in_fp32,
        dropout_p=case.dropout_p,
        zero_centered_weight=case.zero_centered_weight,
        out_dtype=case.out_dtype,
        return_dropout_mask=True,
    )
    return list(outputs)


def plain(case: Case, masks: list[Tensor | None], **given: Tensor | None) -> list[Tensor]:
    """torch's own norms, in float64 if the inputs are, otherwise in x's dtype as users compose them."""
    x, x1, residual = given["x"], given["x1"], given["residual"]
    double = x.dtype == torch.float64
    total = x if given["rowscale"] is None else x * given["rowscale"].to(x.dtype)[..., None]
    total = total if given["layerscale"] is None else total * given["layerscale"].to(x.dtype)
    keep = 1 - case.dropout_p
    total = total if masks[0] is None else total * masks[0] / keep
    if x1 is not None:
        total = total + (x1 if masks[1] is None else x1 * masks[1] / keep)
    total = total if residual is None else total + residual
    if not double:
        total = total.to(FP32 if case.residual_in_fp32 else case.residual_dtype or case.dtype)
    dtype = x.dtype if double else case.out_dtype or x.dtype
    rows = total.to(dtype)
    outputs = []
    for weight, bias in ((given["weight"], given["bias"]), (given["weight1"], given["bias1"])):
        if weight is None:
            continue
        scale = weight.to(dtype) + 1 if case.zero_centered_weight else weight.to(dtype)
        shift = None if bias is None else bias.to(dtype)
        if case.is_rms:
            out = F.rms_norm(rows, rows.shape[-1:], scale, case.eps)
            outputs.append(out if shift is None else out + shift)
        else:
            outputs.append(F.layer_norm(rows, rows.shape[-1:], scale, shift, case.eps))
    return [*outputs, total] if case.prenorm else outputs


def outputs_and_gradients(compute, case, given, upstream, dtype=None) -> tuple[dict[str, Tensor], list]:
    leaves = {
        name: None if tensor is None else tensor.to(dtype or tensor.dtype).clone()
        for name, tensor in given.items()
    }
    wanted = {
        name: leaf.requires_grad_()
        for name, leaf in leaves.items()
        if leaf is not None and name != "rowscale"
    }
    outputs, rest = (results := compute(case, **leaves))[: len(upstream)], results[len(upstream) :]
    torch.autograd.backward(outputs, [g.to(out.dtype) for g, out in zip(upstream, outputs, strict=True)])
    named = {f"output {index}": out.detach() for index, out in enumerate(outputs)}
    return named | {f"d_{name}": leaf.grad for name, leaf in wanted.items()}, rest


def check(case: Case, device: str) -> None:
    given, upstream = inputs(case, device), gradients_of(case, device)
    assert explain(*(tensor for tensor in given.values() if tensor is not None)).path == "triton"
    actual, masks = outputs_and_gradients(ours, case, given, upstream)
    assert [mask is not None for mask in masks] == [
        case.dropout_p > 0,
        case.dropout_p > 0 and case.x1_dtype is not None,
    ]

    def expected(case: Case, **leaves: Tensor | None) -> list[Tensor]:
        return plain(case, masks, **leaves)

    reference, _ = outputs_and_gradients(expected, case, given, upstream, torch.float64)
    same_dtype, _ = outputs_and_gradients(expected, case, given, upstream)
    for name, tensor in actual.items():
        factor = 3.0 if name.startswith("d_") else 2.0
        assert_within_reference_error(tensor, reference[name], same_dtype[name], factor=factor, name=name)
        assert tensor.dtype == same_dtype[name].dtype, name


@pytest.mark.parametrize(
    "case",
    [
        Case((7, 64)),
        Case((1, 100), is_rms=False, bias=True),
        Case((5, 1), dtype=FP32, weight_dtype=FP32),
        Case((2, 33, 257), is_rms=False, bias=True, weight_dtype=FP32, residual_dtype=FP32, prenorm=True),
        Case((64, 1000), zero_centered_weight=True, x1_dtype=BF16, dropout_p=0.3, rowscale=True),
        Case((9, 2048), is_rms=False, residual_dtype=BF16, residual_in_fp32=True, prenorm=True),
        Case((3, 5000)),
    ],
    ids=str,
)
def test_few_rows(case: Case, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program takes all, and one launch."""
    monkeypatch.setattr(tiles, "MAX_VALUES_OF_ONE_PROGRAM", 65536)
    triton_backward = importlib.import_module("flash_attn_ops.norm.triton_backward")
    added = mock.Mock(side_effect=AssertionError("partial sums were added up"))
    monkeypatch.setattr(triton_backward, "_add_partials", added)
    check(case, device)


def test_few_rows_are_as_many(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, where the sums over rows are exact: the order of adding is all that differs."""
    x = torch.randint(-2, 3, (32, 64), device=device).float().requires_grad_()
    weight, bias = (torch.randn(64, device=device, requires_grad=True) for _ in range(2))
    upstream = torch.randint(-4, 5, (32, 64), device=device).float()
    gradients = []
    for limit in (0, 65536):
        monkeypatch.setattr(tiles, "MAX_VALUES_OF_ONE_PROGRAM", limit)
        gradients.append(torch.autograd.grad(layer_norm(x, weight, bias), (x, bias), upstream))
    for many, one in zip(*gradients, strict=True):
        assert torch.equal(many, one)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_small(case: Case, device: str) -> None:
    check(case, device)


@pytest.mark.parametrize("case", PAIRWISE, ids=str)
def test_every_two_options_together(case: Case, device: str) -> None:
    check(case, device)


def test_the_matrix_is_complete() -> None:
    for (a, x_values), (b, y_values) in itertools.combinations(CHOICES.items(), 2):
        if {a, b} != {"weight1", "bias1"}:  # a second bias wants a second weight
            met = {(getattr(case, a), getattr(case, b)) for case in PAIRWISE}
            wanted = set(itertools.product(x_values, y_values))
            assert len(wanted - met) <= (len(y_values) if "bias1" in (a, b) else 0), (a, b)
    assert len(PAIRWISE) < 20


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large(case: Case) -> None:
    check(case, "cuda")


def shrink_limits(monkeypatch: pytest.MonkeyPatch, accumulated_values: int) -> None:
    """Rows of a few hundred values become long ones: for the forward kernel, and for sums of more values."""
    for name, value in {
        "MAX_FORWARD_COLS": 16,
        "MAX_ACCUMULATED_VALUES": accumulated_values,
        "WIDE_COLS": 128,
        "WIDE_GRADIENT_VALUES": 512,
        "WIDE_GRADIENT_COLS": 64,
    }.items():
        monkeypatch.setattr(tiles, name, value)


@pytest.mark.parametrize(
    "case",
    [
        Case((37, 300), is_rms=False, bias=True, residual_dtype=BF16, prenorm=True),
        Case((37, 300), is_rms=False, bias=True, residual_dtype=BF16),
        Case((37, 300), dtype=FP32),
        replace(EVERYTHING, shape=(11, 300)),
    ],
    ids=str,
)
@pytest.mark.parametrize("parts", [1, 2])
def test_rows_too_long_for_registers(
    parts: int, case: Case, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels that walk the columns, and the one that walks a row in two parts, on rows that are long only to
    smaller limits."""
    accumulators = 1 + case.bias + case.weight1 + case.bias1 + case.layerscale
    shrink_limits(monkeypatch, 512 * accumulators if parts == 2 else 1)
    tile = tiles.backward_tile(300, accumulators)
    assert (tile is None) if parts == 1 else (tile.parts == 2)
    check(case, device)


@pytest.mark.parametrize("is_rms", [False, True])
def test_a_mean_far_from_zero(is_rms: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics are centred before they are squared, in blocks too."""
    norm, theirs = (rms_norm, F.rms_norm) if is_rms else (layer_norm, F.layer_norm)
    x = torch.randn(5, 300, device=device) + 1000.0
    weight = torch.ones(300, device=device)
    exact = theirs(x.double(), (300,), eps=1e-5)
    # two units in the last place of the mean; squares of 1e6 would lose the variance
    rounding_of_the_mean = 1000 * 2.0**-22
    for max_cols in (tiles.MAX_FORWARD_COLS, 16):
        monkeypatch.setattr(tiles, "MAX_FORWARD_COLS", max_cols)
        monkeypatch.setattr(tiles, "WIDE_COLS", 128)
        error = (norm(x, weight).double() - exact).abs().max()
        assert error < rounding_of_the_mean, f"{max_cols}: {error}"


def test_no_grad_gives_the_same_output(device: str) -> None:
    case = Case((5, 48), is_rms=False, bias=True, residual_dtype=BF16)
    given = {name: t if t is None else t.requires_grad_() for name, t in inputs(case, device).items()}
    with_grad = ours(case, **given)[0]
    with torch.no_grad():
        without = ours(case, **given)[0]
    torch.testing.assert_close(with_grad, without)
    assert with_grad.requires_grad and not without.requires_grad


@pytest.mark.parametrize("size", [512, 4096, 16384, 40000])
def test_same_bits_twice(size: int) -> None:
    case = Case((3001, size), is_rms=False, bias=True)
    given, upstream = inputs(case, "cuda"), gradients_of(case, "cuda")
    first, second = (outputs_and_gradients(ours, case, given, upstream)[0] for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_more_than_2_to_the_31_elements() -> None:
    """The last rows come out as they do alone."""
    rows, size = 2**31 // 8192 + 37, 8192
    x = torch.randn(rows, size, device="cuda", dtype=BF16).requires_grad_()
    weight = torch.randn(size, device="cuda", dtype=BF16)
    tail = x[-40:].detach().clone().requires_grad_()
    out, expected = rms_norm(x, weight), rms_norm(tail, weight)
    assert torch.equal(out[-40:], expected)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected.backward(upstream[-40:])
    assert torch.equal(x.grad[-40:], tail.grad)
