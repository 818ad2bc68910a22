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
from flash_attn_ops.norm import layer_norm, rms_norm, rms_norm_linear, tiles
from flash_attn_ops.norm.dropout import draw_seed_and_offset, keep_mask
from torch import Tensor

pytestmark = pytest.mark.gpu

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


@pytest.fixture(autouse=True)
def many_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows are taken for many, so that small tests see what large inputs see. Tiles of one test, which changes
    limits, are not remembered for another."""
    for name in ("forward_tile", "backward_tile", "backward_tile_of_few_rows", "backward_plan"):
        monkeypatch.setattr(tiles, name, getattr(tiles, name).__wrapped__)
    monkeypatch.setattr(tiles, "MAX_VALUES_OF_ONE_PROGRAM", 0)


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


@pytest.mark.parametrize("shape", [(3, 5, 37), (1, 1), (5, 1030)], ids=str)
def test_dropout_masks_are_the_reference_ones(shape: tuple[int, ...], device: str) -> None:
    """Bit for bit, whatever device and block an element is in."""
    x = torch.ones(shape, device=device)
    torch.manual_seed(5)
    seed = draw_seed_and_offset(x.device)
    torch.manual_seed(5)
    _, total, mask, mask1 = rms_norm(
        *(x, torch.ones(shape[-1], device=device)),
        x1=x,
        dropout_p=0.4,
        prenorm=True,
        return_dropout_mask=True,
    )
    expected, expected1 = (keep_mask(seed.cpu(), x.shape, 0.4, branch) for branch in (0, 1))
    assert torch.equal(mask.cpu(), expected) and torch.equal(mask1.cpu(), expected1)
    torch.testing.assert_close(total.cpu(), (expected.float() + expected1.float()) / 0.6)
    if x.numel() > 1000:
        assert abs(mask.float().mean().item() - 0.6) < 0.01 and not torch.equal(mask, mask1)


def test_dropout_follows_the_generator(device: str) -> None:
    """The same seed gives the same bits, the next draw others; recomputation under checkpoint repeats the first."""
    x = torch.randn(4, 64, device=device, requires_grad=True)
    weight = torch.ones(64, device=device)

    def call(x: Tensor) -> Tensor:
        return rms_norm(x, weight, dropout_p=0.5)

    torch.manual_seed(1)
    first, second = call(x), call(x)
    torch.manual_seed(1)
    again = call(x)
    assert torch.equal(first, again) and not torch.equal(first, second)
    (expected,) = torch.autograd.grad(first.square().sum() + first.sum(), x)
    torch.manual_seed(1)
    out = torch.utils.checkpoint.checkpoint(call, x, use_reentrant=False)
    torch.manual_seed(77)
    (dx,) = torch.autograd.grad(out.square().sum() + out.sum(), x)
    assert torch.equal(out, first) and torch.equal(dx, expected)


def test_dropout_in_a_cuda_graph() -> None:
    """Every replay draws again, and the backward in it drops what its forward dropped."""
    x = torch.randn(16, 512, device="cuda", requires_grad=True)
    weight = torch.ones(512, device="cuda")

    def step() -> tuple[Tensor, Tensor, Tensor]:
        _, total, mask, _ = rms_norm(x, weight, dropout_p=0.5, prenorm=True, return_dropout_mask=True)
        (dx,) = torch.autograd.grad(total.sum(), x)
        return total, mask, dx

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total, mask, dx = step()
    masks = []
    for _ in range(2):
        graph.replay()
        masks.append(mask.clone())
        assert torch.equal(total, torch.where(mask, x * 2, 0.0)) and torch.equal(dx, mask * 2.0)
    assert not torch.equal(*masks)


def test_dropped_elements_may_hold_anything(device: str) -> None:
    x = torch.randn(6, 64, device=device, requires_grad=True)
    weight = torch.ones(64, device=device)
    torch.manual_seed(3)
    out, mask, _ = layer_norm(x, weight, dropout_p=0.5, return_dropout_mask=True)
    (dx,) = torch.autograd.grad(out.square().sum() + out.sum(), x)
    poisoned = torch.where(mask, x.detach(), float("nan")).requires_grad_()
    torch.manual_seed(3)
    assert torch.equal(again := layer_norm(poisoned, weight, dropout_p=0.5), out)
    assert torch.equal(torch.autograd.grad(again.square().sum() + again.sum(), poisoned)[0], dx)
    assert not dx[~mask].any()


@pytest.mark.parametrize("max_cols", [16, 32768])
def test_results_in_given_memory(max_cols: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place too: out over x, the sum over the residual, in both forward kernels."""
    monkeypatch.setattr(tiles, "MAX_FORWARD_COLS", max_cols)
    monkeypatch.setattr(tiles, "WIDE_COLS", 128)
    x, residual = torch.randn(2, 9, 300, device=device)
    weight = torch.randn(300, device=device)
    expected, total = layer_norm(x, weight, residual=residual, prenorm=True, weight1=weight * 2)[::2]
    out, memory = torch.empty_like(x), torch.empty_like(x)
    results = layer_norm(
        *(x, weight),
        residual=residual,
        prenorm=True,
        weight1=weight * 2,
        out=out,
        residual_out=memory,
    )
    assert results[0] is out and results[2] is memory
    assert torch.equal(out, expected) and torch.equal(memory, total)
    layer_norm(x, weight, residual=residual, prenorm=True, out=x, residual_out=residual)
    assert torch.equal(x, expected) and torch.equal(residual, total)


@pytest.mark.parametrize("autocast", [False, True])
def test_norm_and_linear(autocast: bool, device: str) -> None:
    """Equal to the two layers one after the other; backward has no normalised rows in memory but its own."""
    x, residual = (torch.randn(3, 7, 96, device=device, dtype=FP32, requires_grad=True) for _ in range(2))
    weight, bias, linear_bias = (torch.randn(n, device=device, requires_grad=True) for n in (96, 96, 40))
    linear_weight = (torch.randn(40, 96, device=device) / 10).requires_grad_()
    leaves = (x, residual, weight, bias, linear_weight, linear_bias)
    low = torch.bfloat16 if autocast else FP32
    results = []
    for fused in (True, False):
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            if fused:
                product, total = rms_norm_linear(
                    x, weight, bias, linear_weight, linear_bias, residual=residual, prenorm=True
                )
                saved = product.grad_fn.saved_tensors
                assert not any(t is not None and t.shape == x.shape and t.dtype == low != FP32 for t in saved)
            else:
                out, total = rms_norm(x, weight, bias, residual=residual, prenorm=True, out_dtype=low)
                product = F.linear(out, linear_weight, linear_bias)
        assert product.dtype == low and total.dtype == FP32
        loss = product.float().square().sum() + total.sum()
        results.append([product, total, *torch.autograd.grad(loss, leaves)])
    for actual, expected in zip(*results, strict=True):
        rtol, atol = (2e-2, 2e-1) if autocast else (1e-4, 1e-4)
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_only_some_outputs_used(used: tuple[int, ...], device: str) -> None:
    x, residual = (torch.randn(4, 32, device=device, requires_grad=True) for _ in range(2))
    weight, bias, weight1, bias1 = (torch.randn(32, device=device, requires_grad=True) for _ in range(4))
    leaves = (x, residual, weight, bias, weight1, bias1)
    outputs = layer_norm(
        x, weight, bias, residual=residual, weight1=weight1, bias1=bias1, layerscale=weight, prenorm=True
    )
    total = x * weight + residual
    theirs = [F.layer_norm(total, (32,), *vectors) for vectors in ((weight, bias), (weight1, bias1))] + [
        total
    ]
    upstream = [torch.randn(4, 32, device=device) for _ in used]
    actual, expected = (
        torch.autograd.grad([results[index] for index in used], leaves, upstream, allow_unused=True)
        for results in (outputs, theirs)
    )
    for ours_, theirs_ in zip(actual, expected, strict=True):
        assert (ours_ is None) == (theirs_ is None)
        if ours_ is not None:
            torch.testing.assert_close(ours_, theirs_, rtol=1e-4, atol=1e-4)


def test_strided_inputs_and_gradients(device: str) -> None:
    """Rows with gaps, columns with gaps, an expanded gradient: same results as for contiguous copies."""
    weight = torch.randn(64, device=device)
    variants = {
        "rows with gaps": torch.randn(6, 100, device=device)[:, 20:84],
        "transposed": torch.randn(64, 6, device=device).t(),
        "batch of rows": torch.randn(3, 4, 64, device=device)[:, 1:3],
        "expanded": torch.randn(1, 64, device=device).expand(6, 64),
    }
    for name, x in variants.items():
        leaf, copy = x.detach().requires_grad_(), x.detach().clone().contiguous().requires_grad_()
        out, expected = (
            layer_norm(
                tensor, weight, x1=tensor, rowscale=torch.ones(()).to(tensor).expand(tensor.shape[:-1])
            )
            for tensor in (leaf, copy)
        )
        assert out.is_contiguous(), name
        torch.testing.assert_close(out, expected)
        out.sum().backward()
        expected.backward(torch.ones_like(expected))
        torch.testing.assert_close(leaf.grad, copy.grad)


def test_only_the_returned_sum_used(device: str) -> None:
    x, residual = (torch.randn(4, 32, device=device, dtype=BF16, requires_grad=True) for _ in range(2))
    weight = torch.randn(32, device=device, dtype=BF16, requires_grad=True)
    _, total = rms_norm(x, weight, residual=residual, prenorm=True, residual_in_fp32=True)
    upstream = torch.randn_like(total)
    total.backward(upstream)
    assert torch.equal(x.grad, upstream.to(BF16)) and torch.equal(residual.grad, upstream.to(BF16))
    assert weight.grad is None


def test_no_grad_gives_the_same_output(device: str) -> None:
    case = Case((5, 48), is_rms=False, bias=True, residual_dtype=BF16)
    given = {name: t if t is None else t.requires_grad_() for name, t in inputs(case, device).items()}
    with_grad = ours(case, **given)[0]
    with torch.no_grad():
        without = ours(case, **given)[0]
    torch.testing.assert_close(with_grad, without)
    assert with_grad.requires_grad and not without.requires_grad


def test_double_backward_is_an_error(device: str) -> None:
    x = torch.randn(2, 16, device=device, requires_grad=True)
    out = rms_norm(x, torch.ones(16, device=device))
    (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("size", [512, 4096, 16384, 40000])
def test_same_bits_twice(size: int) -> None:
    case = Case((3001, size), is_rms=False, bias=True)
    given, upstream = inputs(case, "cuda"), gradients_of(case, "cuda")
    first, second = (outputs_and_gradients(ours, case, given, upstream)[0] for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_more_than_2_to_the_31_elements_dropped() -> None:
    """Rows far down have decisions of their own, the reference's."""
    rows, size = 2**31 // 4096 + 5, 4096
    x = torch.ones(rows, size, device="cuda", dtype=BF16)
    weight = torch.ones(size, device="cuda", dtype=BF16)
    torch.manual_seed(4)
    seed = draw_seed_and_offset(x.device)
    torch.manual_seed(4)
    with torch.no_grad():
        _, total = rms_norm(x, weight, dropout_p=0.5, prenorm=True)
    expected = keep_mask(seed, torch.Size((rows, 4)), 0.5, 0)
    assert torch.equal(total[:, :4] != 0, expected)
    assert not torch.equal(expected[:5], expected[-5:])


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


@pytest.mark.parametrize("norm", [layer_norm, rms_norm], ids=lambda norm: norm.__name__)
def test_compiles_to_one_graph(norm, device: str) -> None:
    """With every combination of outputs: the sum returned, stored, neither; gradients of one dtype and of two."""

    def block(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out, total = norm(x * 2, weight, bias, residual=residual, prenorm=True)
        out = norm(out, weight, residual=residual.half())
        scales = {"layerscale": weight / 2, "rowscale": residual.detach()[..., 0]}
        out, out1 = norm(out, weight, bias, x1=total, weight1=bias + 1, **scales)
        return (norm(out, weight, bias) + total + out1).square()

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 12):
        shapes = ((3, rows, 64), (3, rows, 64), (64,), (64,))
        leaves = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
        copies = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        out, expected = compiled(*leaves), block(*copies)
        torch.testing.assert_close(out, expected)
        out.sum().backward()
        expected.sum().backward()
        for leaf, copy in zip(leaves, copies, strict=True):
            torch.testing.assert_close(leaf.grad, copy.grad, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*leaves), expected)


def test_dropout_compiles(device: str) -> None:
    """One graph; backward drops what forward dropped."""
    weight = torch.ones(64, device=device)

    def block(x: Tensor) -> tuple[Tensor, ...]:
        return rms_norm(x * 1, weight, dropout_p=0.5, prenorm=True, return_dropout_mask=True)

    x = torch.randn(5, 64, device=device, requires_grad=True)
    _, total, mask, _ = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(total, torch.where(mask, x * 2, 0.0))
    (dx,) = torch.autograd.grad(total.sum(), x)
    torch.testing.assert_close(dx, mask * 2.0)


def test_given_memory_compiles(device: str) -> None:
    weight = torch.ones(64, device=device)

    def block(x: Tensor, out: Tensor, total: Tensor) -> Tensor:
        rms_norm(x, weight, residual=total, prenorm=True, out=out, residual_out=total)
        return out + total

    x, out, total = (torch.randn(5, 64, device=device) for _ in range(3))
    copies = out.clone(), total.clone()
    result = torch.compile(block, fullgraph=True, backend="aot_eager")(x, out, total)
    torch.testing.assert_close(result, block(x, *copies))
    torch.testing.assert_close((out, total), copies)


@pytest.mark.parametrize("is_rms", [False, True])
@pytest.mark.parametrize("present", [False, True])
def test_operators_keep_their_word(is_rms: bool, present: bool, device: str) -> None:
    """Schema and fake describe what the launchers do, with all optional tensors or none, dense or strided."""
    x = torch.randn(5, 3, 32, device=device).to(FP16).transpose(0, 1)
    vectors = torch.randn(5, 64, device=device)[:, ::2]
    weight, bias, weight1, bias1, layerscale = vectors
    residual = torch.randn(3, 5, 32, device=device)
    rowscale, seed = torch.rand(3, 5, device=device), draw_seed_and_offset(x.device)
    norm_forward = torch.ops.flash_attn_ops.norm_forward.default
    norm_backward = torch.ops.flash_attn_ops.norm_backward.default
    optional = [residual.half(), residual, rowscale, layerscale, seed, bias, weight1, bias1]
    x1, given, rowscale, layerscale, seed, bias, weight1, bias1 = optional if present else [None] * 8
    sum_dtype, dropout_p = (FP32, 0.2) if present else (FP16, 0.0)
    args = (x, x1, given, rowscale, layerscale, seed, weight, bias, weight1, bias1)
    args += (1e-5, dropout_p, is_rms, present, FP16, sum_dtype)
    torch.library.opcheck(norm_forward, (*args, present, True, None, None))
    torch.library.opcheck(norm_forward, (*args, present, False, None, None))
    memory = torch.empty(3, 5, 32, device=device, dtype=FP16)
    torch.library.opcheck(norm_forward, (*args, True, False, memory, memory.to(sum_dtype)))
    _, _, total, mean, rstd = norm_forward(*args, present, True, None, None)
    total = total if present else x
    mean = None if is_rms else mean
    d_out1 = residual if present else None
    args = (
        x,
        d_out1,
        given,
        total,
        x if present else None,
        rowscale,
        layerscale,
        seed,
        weight,
        weight1,
        mean,
        rstd,
    )
    dtypes = (FP32,) * 4 if present else (None,) * 4
    torch.library.opcheck(norm_backward, (*args, dropout_p, is_rms, present, FP16, *dtypes))
    if present:
        torch.library.opcheck(torch.ops.flash_attn_ops.norm_dropout_mask.default, (seed, x, 0.2, 1))
