"""The names of the dropout-add-norm family: order of arguments, order and dtypes of results, row maps."""

from __future__ import annotations

import inspect

import pytest
import torch
from flash_attn_ops.norm import dropout_add, layer_norm, layer_norm_linear, rms_norm
from torch import Tensor

BF16, FP32 = torch.bfloat16, torch.float32
FAMILIES = pytest.mark.parametrize(
    ("family", "norm"), [("layer_norm", layer_norm), ("rms_norm", rms_norm)], ids=["layer_norm", "rms_norm"]
)


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = FP32) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def repeat(call, *args, **kwargs):
    """With the masks of every other call."""
    torch.manual_seed(9)
    return call(*args, **kwargs)


def assert_same(actual, expected) -> None:
    assert len(actual) == len(expected)
    for mine, theirs in zip(actual, expected, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)


def test_orders_of_arguments() -> None:
    names = {
        "dropout_add_layer_norm": "x0 residual weight bias dropout_p epsilon rowscale layerscale prenorm "
        "residual_in_fp32 return_dropout_mask",
        "dropout_add_layer_norm_subset": "x0 residual weight bias dropout_p epsilon layerscale x0_subset out_subset "
        "rowscale_const out_numrows prenorm residual_in_fp32 return_dropout_mask",
        "dropout_add_layer_norm_parallel_residual": "x0 x1 residual weight0 bias0 weight1 bias1 dropout_p epsilon "
        "prenorm residual_in_fp32 return_dropout_mask",
        "layer_norm_fn": "x weight bias residual x1 weight1 bias1 eps dropout_p rowscale prenorm residual_in_fp32 "
        "is_rms_norm options",
    }
    for name, expected in names.items():
        assert " ".join(inspect.signature(getattr(dropout_add, name)).parameters) == expected
        if name != "layer_norm_fn":
            rms = getattr(dropout_add, name.replace("layer", "rms"))
            assert " ".join(inspect.signature(rms).parameters) == expected


@FAMILIES
def test_dropout_add(family: str, norm) -> None:
    call = getattr(dropout_add, f"dropout_add_{family}")
    x0, residual, weight, bias, rowscale, layerscale = tensors((2, 6, 8), (2, 6, 8), (8,), (8,), (2, 6), (8,))
    scales = {"rowscale": rowscale, "layerscale": layerscale}
    *expected, mask, _ = repeat(
        *(norm, x0, weight, bias),
        residual=residual,
        dropout_p=0.3,
        eps=1e-6,
        prenorm=True,
        return_dropout_mask=True,
        **scales,
    )
    args = (x0, residual, weight, bias, 0.3, 1e-6, rowscale, layerscale)
    assert torch.equal(repeat(call, *args), expected[0])
    assert_same(repeat(call, *args, True, False, True), [*expected, mask.to(torch.uint8)])
    assert_same(repeat(call, *args, return_dropout_mask=True), [expected[0], mask.to(torch.uint8)])
    ones = call(x0, residual, weight, bias, 0.0, 1e-6, return_dropout_mask=True)[1]
    assert torch.equal(ones, torch.ones_like(x0, dtype=torch.uint8))


@FAMILIES
def test_dtype_of_the_sum(family: str, norm) -> None:
    """That of the residual; without one float32 if asked for, else that of x0."""
    call = getattr(dropout_add, f"dropout_add_{family}")
    x0, residual, weight = tensors((3, 8), (3, 8), (8,), dtype=BF16)
    for given, in_fp32, expected in (
        (residual, True, BF16),
        (residual.float(), False, FP32),
        (None, True, FP32),
        (None, False, BF16),
    ):
        out, total = call(x0, given, weight, None, 0.0, 1e-5, prenorm=True, residual_in_fp32=in_fp32)
        assert out.dtype == BF16 and total.dtype == expected
        named = getattr(dropout_add, f"{family}_fn")
        assert_same(
            named(x0, weight, None, given, eps=1e-5, prenorm=True, residual_in_fp32=in_fp32), (out, total)
        )


@FAMILIES
@pytest.mark.parametrize("has_x1", [True, False])
@pytest.mark.parametrize("has_weight1", [True, False])
def test_parallel_residual(family: str, norm, has_x1: bool, has_weight1: bool) -> None:
    call = getattr(dropout_add, f"dropout_add_{family}_parallel_residual")
    x0, x1, residual = tensors((5, 8), (5, 8), (5, 8))
    weight0, bias0, weight1, bias1 = tensors((8,), (8,), (8,), (8,))
    x1 = x1 if has_x1 else None
    weight1, bias1 = (weight1, bias1) if has_weight1 else (None, None)
    out0, *rest, total, mask0, mask1 = repeat(
        *(norm, x0, weight0, bias0),
        x1=x1,
        residual=residual,
        weight1=weight1,
        bias1=bias1,
        dropout_p=0.4,
        prenorm=True,
        return_dropout_mask=True,
    )
    expected = [out0, rest[0] if has_weight1 else None, total, mask0.to(torch.uint8)]
    expected.append(mask1.to(torch.uint8) if has_x1 else None)
    args = (x0, x1, residual, weight0, bias0, weight1, bias1, 0.4, 1e-5)
    assert_same(repeat(call, *args, True, False, True), expected)
    assert_same(repeat(call, *args), expected[:2])


@FAMILIES
def test_subset(family: str, norm) -> None:
    """Rows 1, 3, 4 of six have a branch; rows 0, 3, 5 of the norm are wanted, in another order."""
    call = getattr(dropout_add, f"dropout_add_{family}_subset")
    x0, residual, weight, bias, layerscale = tensors((3, 8), (6, 8), (8,), (8,), (8,))
    x0_subset = torch.tensor([0, 2, 0, 1, 3, 0], dtype=torch.int32)
    out_subset = torch.tensor([3, 0, 0, 1, 0, 2], dtype=torch.int32)
    leaves = [tensor.requires_grad_() for tensor in (x0, residual, weight, bias, layerscale)]
    out, total, mask = repeat(
        *(call, x0, residual, weight, bias, 0.25, 1e-5, layerscale, x0_subset, out_subset, 2.0, 4),
        prenorm=True,
        return_dropout_mask=True,
    )
    rows = [1, 3, 4]  # of the sum; x0's rows 1, 0, 2
    assert mask.shape == x0.shape and mask.dtype == torch.uint8 and 0 < mask.sum() < 24
    branch = torch.zeros(6, 8).index_put(
        (torch.tensor(rows),), (x0 * mask * layerscale * 2 / 0.75)[[1, 0, 2]]
    )
    expected_total = branch + residual
    every = norm(expected_total, weight, bias)
    expected = torch.cat([every[[3, 5, 0]], torch.zeros(1, 8)])
    torch.testing.assert_close(total, expected_total)
    torch.testing.assert_close(out, expected)
    upstream, d_total = torch.randn(4, 8), torch.randn(6, 8)
    actual = torch.autograd.grad((out, total), leaves, (upstream, d_total))
    reference = torch.autograd.grad((expected, expected_total), leaves, (upstream, d_total))
    for mine, theirs in zip(actual, reference, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_subset_without_maps_is_the_plain_call() -> None:
    x0, residual, weight, bias = tensors((4, 8), (4, 8), (8,), (8,))
    args = (x0, residual, weight, bias, 0.3, 1e-5)
    expected = repeat(dropout_add.dropout_add_layer_norm, *args, return_dropout_mask=True)
    assert_same(repeat(dropout_add.dropout_add_layer_norm_subset, *args, return_dropout_mask=True), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x0": torch.ones(2, 3, 8)}, r"x0: got shape \(2, 3, 8\); expected \(rows, N\)"),
        ({"x0_subset": torch.ones(6)}, r"x0_subset: got torch.float32; expected torch.int32 or torch.int64"),
        (
            {"x0_subset": [0, 1]},
            r"x0_subset: got list; expected a torch.Tensor of torch.int32 or torch.int64",
        ),
        (
            {"x0_subset": torch.tensor([0, 1, 4, 0, 0, 0])},
            r"x0_subset: got values from 0 to 4; expected 0 to 3",
        ),
        ({"x0_subset": torch.full((6,), -1)}, r"x0_subset: got values from -1 to -1; expected 0 to 3"),
        ({"out_subset": torch.ones(5, dtype=torch.int32)}, r"out_subset: got shape \(5,\); expected \(6,\)"),
        (
            {"out_subset": torch.ones(6, dtype=torch.int32)},
            r"out_subset: got values from 1 to 1; .*out_numrows",
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_subset_rejects(change: dict, message: str) -> None:
    good = {"x0": torch.ones(3, 8), "x0_subset": torch.zeros(6, dtype=torch.int32)}
    residual, weight = torch.ones(6, 8), torch.ones(8)
    with pytest.raises(ValueError, match=message):
        dropout_add.dropout_add_layer_norm_subset(
            **{**good, **change}, residual=residual, weight=weight, bias=None, dropout_p=0.0, epsilon=1e-5
        )


def test_functions_by_their_other_names() -> None:
    x, residual, x1, weight, bias, weight1, bias1 = tensors((3, 8), (3, 8), (3, 8), (8,), (8,), (8,), (8,))
    rowscale = torch.rand(3)
    for call, norm in ((dropout_add.layer_norm_fn, layer_norm), (dropout_add.rms_norm_fn, rms_norm)):
        expected = repeat(
            *(norm, x, weight, bias),
            residual=residual,
            x1=x1,
            weight1=weight1,
            bias1=bias1,
            eps=1e-6,
            dropout_p=0.2,
            rowscale=rowscale,
            prenorm=True,
            return_dropout_mask=True,
        )
        args = (x, weight, bias, residual, x1, weight1, bias1, 1e-6, 0.2, rowscale, True, False)
        assert_same(repeat(call, *args, return_dropout_mask=True), expected)
    rms = dropout_add.layer_norm_fn(x, weight, bias, is_rms_norm=True, zero_centered_weight=True)
    assert torch.equal(rms, rms_norm(x, weight, bias, eps=1e-6, zero_centered_weight=True))
    linear_weight, linear_bias = tensors((4, 8), (4,))
    product = dropout_add.layer_norm_linear_fn(x, weight, bias, linear_weight, linear_bias, residual, 1e-6)
    expected = layer_norm_linear(x, weight, bias, linear_weight, linear_bias, residual=residual, eps=1e-6)
    assert torch.equal(product, expected)


def test_modules() -> None:
    x0, residual = tensors((3, 8), (3, 8))
    for module in (
        dropout_add.DropoutAddLayerNorm(8, True, 0.5),
        dropout_add.DropoutAddRMSNorm(8, True, 0.5),
    ):
        assert (module.bias is None) == isinstance(module, dropout_add.DropoutAddRMSNorm)
        _, dropped = module(x0, residual)
        assert not torch.equal(dropped, x0 + residual)
        out, total = module.eval()(x0, residual)
        norm = layer_norm if module.bias is not None else rms_norm
        assert torch.equal(total, x0 + residual) and torch.equal(out, norm(total, module.weight, module.bias))
    single = dropout_add.DropoutAddRMSNorm(8, residual_in_fp32=True)
    assert torch.equal(single(x0), rms_norm(x0, single.weight))
