"""LayerNorm and RMSNorm away from the GPU: the reference, the options, the modules, rejected arguments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from flash_attn_kernels.testing import assert_within_reference_error
from flash_attn_ops.norm import (
    LayerNorm,
    RMSNorm,
    functions,
    layer_norm,
    layer_norm_linear,
    linear,
    operators,
    reference,
    rms_norm,
    rms_norm_linear,
    tiles,
)
from flash_attn_ops.norm.dropout import keep_mask
from torch import Tensor

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NORMS = pytest.mark.parametrize("norm", [layer_norm, rms_norm], ids=lambda norm: norm.__name__)


def textbook(norm, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """The equations, in the dtype of x."""
    if norm is layer_norm:
        centred = x - x.mean(-1, keepdim=True)
        out = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    else:
        out = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return out if bias is None else out + bias


@NORMS
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
def test_against_the_equations_in_float64(norm, dtype: torch.dtype, with_residual: bool) -> None:
    x, residual = (torch.randn(2, 5, 33) + 1).to(dtype), torch.randn(2, 5, 33).to(dtype)
    weight, bias, upstream = (
        torch.randn(33).to(dtype),
        torch.randn(33).to(dtype),
        torch.randn(2, 5, 33).to(dtype),
    )
    results = []
    for kind, precision in (("ours", dtype), ("exact", FP64), ("same", dtype)):
        leaves = [tensor.to(precision).clone().requires_grad_() for tensor in (x, weight, bias, residual)]
        x_, weight_, bias_, residual_ = leaves
        if kind == "ours":
            out = norm(x_, weight_, bias_, residual=residual_ if with_residual else None)
        else:
            out = textbook(norm, x_ + residual_ if with_residual else x_, weight_, bias_)
        out.backward(upstream.to(precision))
        results.append([out, *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    for index, (actual, exact, same) in enumerate(zip(*results, strict=True)):
        assert_within_reference_error(actual, exact, same, factor=2.0 if index == 0 else 3.0)


@NORMS
def test_gradcheck(norm) -> None:
    def both_outputs(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return norm(x, weight, bias, residual=residual, prenorm=True)

    shapes = ((3, 5), (5,), (5,), (3, 5))
    inputs = [torch.randn(shape, dtype=FP64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(both_outputs, inputs)


@NORMS
def test_every_option_acts(norm) -> None:
    x, residual = torch.randn(2, 4, 8).to(BF16)
    weight, bias = torch.randn(2, 8).to(BF16)
    plain = norm(x, weight)
    assert plain.dtype == BF16
    assert not torch.equal(norm(x, weight, bias), plain)
    assert not torch.equal(norm(x, weight, residual=residual), plain)
    assert not torch.equal(norm(x, weight, eps=1.0), plain)
    out, total = norm(x, weight, residual=residual, prenorm=True)
    assert torch.equal(total, x + residual) and torch.equal(out, norm(total, weight))
    out, total = norm(x, weight, residual=residual, prenorm=True, residual_in_fp32=True)
    assert total.dtype == FP32 and torch.equal(total, x.float() + residual.float()) and out.dtype == BF16
    out, total = norm(x, weight, prenorm=True, residual_in_fp32=True)
    assert total.dtype == FP32 and torch.equal(out, plain)
    _, total = norm(x, weight, prenorm=True)
    assert torch.equal(total, x) and total.dtype == BF16


def everything(seed: int = 0, dtype: torch.dtype = FP64) -> dict[str, Tensor]:
    """Every tensor option at once."""
    torch.manual_seed(seed)
    tensors = {name: torch.randn(3, 5, dtype=dtype) for name in ("x", "residual", "x1")}
    vectors = ("weight", "bias", "weight1", "bias1", "layerscale")
    tensors |= {name: torch.randn(5, dtype=dtype) for name in vectors}
    return tensors | {"rowscale": torch.rand(3, dtype=dtype) + 0.5}


@NORMS
def test_gradcheck_of_everything(norm) -> None:
    given = everything()
    rowscale = given.pop("rowscale")

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(11)  # the same mask each time
        options = {"prenorm": True, "dropout_p": 0.4, "zero_centered_weight": True, "rowscale": rowscale}
        return norm(**dict(zip(given, leaves, strict=True)), **options)

    assert torch.autograd.gradcheck(call, [tensor.requires_grad_() for tensor in given.values()])


@NORMS
def test_the_order_of_terms(norm) -> None:
    """r = dropout(x * rowscale * layerscale) + dropout(x1) + residual, written out with the masks returned."""
    given = everything()
    p = 0.4
    out, out1, total, mask, mask1 = norm(**given, prenorm=True, dropout_p=p, return_dropout_mask=True)
    assert mask.dtype == mask1.dtype == torch.bool and 0 < mask.sum() < 15 and not torch.equal(mask, mask1)
    x = given["x"] * given["rowscale"][:, None] * given["layerscale"]
    expected = x * mask / (1 - p) + given["x1"] * mask1 / (1 - p) + given["residual"]
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(out, textbook(norm, total, given["weight"], given["bias"]))
    torch.testing.assert_close(out1, textbook(norm, total, given["weight1"], given["bias1"]))


@NORMS
@pytest.mark.parametrize("option", ["residual", "x1", "weight1", "bias", "rowscale", "layerscale"])
def test_every_tensor_option_acts(norm, option: str) -> None:
    given = everything()
    without = {name: tensor for name, tensor in given.items() if name not in (option, "bias1")}
    del given["bias1"]
    first, second = norm(**given, prenorm=True), norm(**without, prenorm=True)
    assert len(first) == 3 and len(second) == (2 if option == "weight1" else 3)
    assert torch.equal(first[0], second[0]) == (option == "weight1")
    assert torch.equal(first[-1], second[-1]) == (option in ("weight1", "bias"))


@NORMS
def test_more_options_act(norm) -> None:
    given = everything(dtype=FP32)
    out, out1, total = norm(**given, prenorm=True)
    assert not torch.equal(norm(**{**given, "bias1": None}, prenorm=True)[1], out1)
    shifted = {**given, "weight": given["weight"] - 1, "weight1": given["weight1"] - 1}
    torch.testing.assert_close(norm(**shifted, prenorm=True, zero_centered_weight=True), (out, out1, total))
    low = norm(**given, out_dtype=BF16, prenorm=True)
    assert [tensor.dtype for tensor in low] == [BF16, BF16, FP32] and torch.equal(low[0], out.to(BF16))
    plain = norm(given["x"], given["weight"], return_dropout_mask=True)
    assert plain[1:] == (None, None)
    torch.manual_seed(1)
    first = norm(given["x"], given["weight"], dropout_p=0.5)
    torch.manual_seed(1)
    assert torch.equal(norm(given["x"], given["weight"], dropout_p=0.5), first)
    assert not torch.equal(norm(given["x"], given["weight"], dropout_p=0.5), first)


@NORMS
def test_results_in_given_memory(norm) -> None:
    x, residual = torch.randn(2, 4, 8)
    weight = torch.randn(8)
    expected, total = norm(x, weight, residual=residual, prenorm=True)
    out, memory = torch.empty(4, 8, dtype=BF16), torch.empty(4, 8)
    results = norm(x, weight, residual=residual, prenorm=True, out=out, residual_out=memory)
    assert results[0] is out and results[1] is memory
    assert torch.equal(out, expected.to(BF16)) and torch.equal(memory, total)
    results = norm(x, weight, prenorm=True, residual_out=memory)
    assert results[1] is memory and torch.equal(memory, x)
    norm(x, weight, residual=residual, prenorm=True, out=x, residual_out=residual)
    assert torch.equal(x, expected) and torch.equal(residual, total)


@NORMS
def test_the_sum_survives_an_output_in_its_memory(norm) -> None:
    """Without a residual r is x: it must not be what has overwritten x."""
    x, weight = torch.randn(4, 8), torch.randn(8)
    expected = norm(x, weight)
    for memory in (None, torch.empty_like(x)):
        overwritten = x.clone()
        out, total = norm(overwritten, weight, prenorm=True, out=overwritten, residual_out=memory)
        assert out is overwritten and torch.equal(out, expected) and torch.equal(total, x)


@NORMS
def test_autograd_learns_of_what_kernels_overwrite(norm, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward_unseen(*arguments: object) -> tuple[Tensor | None, ...]:
        *inputs, _, _, out, residual_out = arguments
        result, result1, total = reference.forward(*inputs)  # type: ignore[arg-type]
        out.data.copy_(result)  # type: ignore[attr-defined]
        residual_out.data.copy_(total)  # type: ignore[attr-defined]
        return None, result1, None, None, None

    monkeypatch.setattr(functions, "_plan", lambda tensors, *_: (True, tensors[0].dtype, True))
    monkeypatch.setattr(operators, "forward", forward_unseen)
    for saved in (0, 1):
        x, residual = (torch.randn(4, 8, requires_grad=True) * 1 for _ in range(2))
        square = (x, residual)[saved].square()
        with torch.no_grad():
            norm(x, torch.ones(8), residual=residual, prenorm=True, out=x, residual_out=residual)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            square.sum().backward()


def test_masks_do_not_depend_on_the_number_of_columns_or_rows() -> None:
    seed = torch.tensor([2**40 + 17, 2**33 + 5])
    wide = keep_mask(seed, torch.Size((64, 130)), 0.3, 0)
    assert torch.equal(keep_mask(seed, torch.Size((4, 8, 33)), 0.3, 0).flatten(0, 1), wide[:32, :33])
    for other in (keep_mask(seed, wide.shape, 0.3, 1), keep_mask(seed + 1, wide.shape, 0.3, 0)):
        agreement = (other == wide).float().mean().item()
        assert abs(agreement - (0.7**2 + 0.3**2)) < 0.03, "independent draws"
    assert abs(wide.float().mean().item() - 0.7) < 0.02
    assert keep_mask(seed, wide.shape, 0.0, 0).all()


@pytest.mark.parametrize("norm_linear", [layer_norm_linear, rms_norm_linear], ids=lambda f: f.__name__)
@pytest.mark.parametrize("autocast", [False, True])
def test_norm_and_linear(norm_linear, autocast: bool) -> None:
    norm = layer_norm if norm_linear is layer_norm_linear else rms_norm
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((2, 3, 8), (2, 3, 8), 8, 8, (5, 8), 5)]
    x, residual, weight, bias, linear_weight, linear_bias = leaves
    results = []
    for fused in (True, False):
        with torch.autocast("cpu", dtype=BF16, enabled=autocast):
            if fused:
                product, total = norm_linear(*leaves[:1], *leaves[2:], residual=residual, prenorm=True)
            else:
                out, total = norm(x, weight, bias, residual=residual, prenorm=True)
                product = F.linear(out, linear_weight, linear_bias)
        assert product.dtype == (BF16 if autocast else FP32) and total.dtype == FP32
        loss = product.float().square().sum() + total.sum()
        results.append([product, total, *torch.autograd.grad(loss, leaves)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, **({"rtol": 2e-2, "atol": 0.1} if autocast else {}))


def kernel_path_by_torch(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Norm and linear take the path of kernels, which are torch's norm. Returns what is called, in order."""
    called = []

    def forward(x: Tensor, *rest: object) -> tuple[Tensor | None, ...]:
        called.append("forward")
        *inputs, stores_sum, _, _, _ = (x, *rest)
        out, _, total = reference.forward(*inputs)
        return out, None, total if stores_sum else None, None, torch.empty(x.shape[:-1].numel())

    def backward(d_out: Tensor, _: None, d_sum: Tensor | None, total: Tensor, *rest: object) -> tuple:
        called.append("backward")
        weight = rest[4]
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in (total, weight)]
            out = rms_norm(*leaves, eps=1e-5)
        dx, dw = torch.autograd.grad(out, leaves, d_out)
        return (dx if d_sum is None else dx + d_sum), None, None, dw, None, None, None, None

    monkeypatch.setattr(linear, "runs_on_triton", lambda *_: True)
    monkeypatch.setattr(operators, "forward", forward)
    monkeypatch.setattr(operators, "backward", backward)
    return called


@pytest.mark.parametrize("needed", ["x residual", "linear_weight", "linear_bias", "weight linear_bias"])
def test_norm_and_linear_compute_what_is_needed(needed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen linear weight costs neither its product nor the rows for it."""
    names = ("x", "residual", "weight", "linear_weight", "linear_bias")
    shapes = ((2, 3, 8), (2, 3, 8), (8,), (5, 8), (5,))
    given = {
        name: torch.randn(shape, requires_grad=name in needed.split())
        for name, shape in zip(names, shapes, strict=True)
    }
    leaves = [tensor for tensor in given.values() if tensor.requires_grad]
    upstream = torch.randn(2, 3, 5)
    expected = torch.autograd.grad(rms_norm_linear(bias=None, **given), leaves, upstream)
    called = kernel_path_by_torch(monkeypatch)
    product = rms_norm_linear(bias=None, **given)
    del called[:]
    actual = torch.autograd.grad(product, leaves, upstream)
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    of_norm = {"x", "residual", "weight"} & set(needed.split())
    assert called == ["forward"] * ("linear_weight" in needed) + ["backward"] * bool(of_norm)


def test_norm_and_linear_without_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_path_by_torch(monkeypatch)
    x, linear_weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(0, 8, requires_grad=True)
    product = rms_norm_linear(x, torch.ones(8), None, linear_weight)
    product.sum().backward()
    assert product.shape == (2, 3, 0) and linear_weight.grad.shape == (0, 8) and not x.grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"linear_weight": torch.ones(3, 5)}, r"linear_weight: got shape \(3, 5\); expected \(M, 4\)"),
        (
            {"linear_weight": torch.ones(3, 4, dtype=BF16)},
            r"linear_weight: got torch.bfloat16; expected torch.f",
        ),
        ({"linear_bias": torch.ones(4)}, r"linear_bias: got shape \(4,\); expected \(3,\)"),
        (
            {"linear_bias": torch.ones(3, dtype=FP64)},
            r"linear_bias: got torch.float64; expected torch.float32",
        ),
        ({"weight": torch.ones(3)}, r"weight: got shape \(3,\)"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else "",
)
def test_norm_and_linear_reject(change: dict, message: str) -> None:
    good = {"x": torch.ones(2, 4), "weight": torch.ones(4), "bias": None, "linear_weight": torch.ones(3, 4)}
    with pytest.raises(ValueError, match=message) as error:
        layer_norm_linear(**{**good, **change})
    assert "Fix: " in str(error.value)


def test_tiles_cover_every_size_and_hold_their_sums() -> None:
    for size in (1, 16, 100, 1024, 2048, 4096, 5000, 8192, 16384, 20000, 32768, 65536, 262144):
        forward = tiles.forward_tile(size)
        assert (forward is None) == (size > 32768)
        assert forward is None or forward.cols >= size
        for accumulators in range(1, 6):
            tile = tiles.backward_tile(size, accumulators)
            if tile is None:
                assert size * accumulators > 8192
                continue
            assert tile.parts * tile.cols >= size and tile.num_warps <= 32
            sums_a_thread = accumulators * tile.rows * tile.cols * tile.parts // (32 * tile.num_warps)
            registers_a_thread = min(255, 65536 // (32 * tile.num_warps))
            assert sums_a_thread <= 0.7 * registers_a_thread, (size, accumulators, tile)
    for size in (1024, 2048, 4096, 8192, 16384):
        assert tiles.backward_tile(size, 2) is not None, (
            "LayerNorm's weight and bias, each element touched once"
        )


@NORMS
def test_dtypes_may_differ(norm) -> None:
    x, residual, weight = torch.randn(4, 8).to(BF16), torch.randn(4, 8), torch.randn(8, dtype=FP32)
    out, total = norm(x, weight, residual=residual, prenorm=True)
    assert out.dtype == BF16 and total.dtype == FP32
    double, total = norm(x.double(), weight, prenorm=True, residual_in_fp32=True)
    assert double.dtype == FP64 and total.dtype == FP64, "float32 at least, never less than the input"


@NORMS
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (2, 0, 8), (8,)], ids=str)
def test_empty_and_single_rows(norm, shape: tuple[int, ...], dropout_p: float) -> None:
    x = torch.randn(shape, requires_grad=True)
    weight, bias = (torch.randn(shape[-1], requires_grad=True) for _ in range(2))
    out, total = norm(x, weight, bias, residual=torch.randn(shape), prenorm=True, dropout_p=dropout_p)
    (out.sum() + total.sum()).backward()
    assert out.shape == total.shape == shape
    assert x.grad.shape == shape and weight.grad.shape == bias.grad.shape == weight.shape
    if 0 in shape:
        assert torch.equal(weight.grad, torch.zeros_like(weight))


@NORMS
def test_any_strides(norm) -> None:
    weight = torch.randn(6)
    for x in (torch.randn(6, 5).t(), torch.randn(5, 12)[:, ::2], torch.randn(1, 6).expand(5, 6)):
        torch.testing.assert_close(norm(x, weight), norm(x.contiguous(), weight))


@NORMS
def test_compiles_to_one_graph(norm) -> None:
    def block(x: Tensor, weight: Tensor) -> Tensor:
        out, total = norm(x, weight, residual=x * 2, prenorm=True)
        return out + total

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 7):
        leaf, weight = torch.randn(rows, 8, requires_grad=True), torch.randn(8)
        copy = leaf.detach().clone().requires_grad_()
        compiled(leaf, weight).sum().backward()
        block(copy, weight).sum().backward()
        torch.testing.assert_close(leaf.grad, copy.grad)


@NORMS
def test_autocast_changes_nothing(norm) -> None:
    x, weight = torch.randn(4, 8).to(BF16), torch.randn(8)
    expected = norm(x, weight)
    with torch.autocast("cpu", dtype=BF16):
        assert torch.equal(norm(x, weight), expected)


def test_modules_match_torch() -> None:
    x, residual = torch.randn(2, 3, 4, 16)
    for ours, theirs in (
        (LayerNorm(16, eps=1e-3), torch.nn.LayerNorm(16, eps=1e-3)),
        (LayerNorm(16, bias=False), torch.nn.LayerNorm(16, bias=False)),
        (RMSNorm(16, eps=1e-4), torch.nn.RMSNorm(16, eps=1e-4)),
    ):
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.uniform_(-1, 1)
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours(x), theirs(x))
        out, total = ours(x.to(BF16), residual=residual.to(BF16), prenorm=True, residual_in_fp32=True)
        assert total.dtype == FP32 and out.dtype == BF16
    assert torch.equal(LayerNorm(5).weight, torch.ones(5)) and torch.equal(LayerNorm(5).bias, torch.zeros(5))
    assert RMSNorm(5, dtype=BF16).weight.dtype == BF16 and "eps=0.1" in repr(RMSNorm(5, eps=0.1))


def test_matches_torch_functional_bit_for_bit_in_float32() -> None:
    """On a CPU LayerNorm is torch's own kernel."""
    x, weight, bias = torch.randn(4, 16), torch.randn(16), torch.randn(16)
    assert torch.equal(layer_norm(x, weight, bias), F.layer_norm(x, (16,), weight, bias))


GOOD = {"x": torch.ones(2, 4), "weight": torch.ones(4)}


@NORMS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 4, dtype=torch.int64)}, r"x: got torch.int64; expected a floating-point dtype"),
        ({"x": torch.ones(2, 4).to(torch.float8_e5m2)}, r"x: got torch.float8_e5m2; .* of 16 bits or more"),
        ({"x": torch.tensor(1.0)}, r"x: got a scalar; expected at least one dimension"),
        ({"x": [1.0]}, r"x: got list; expected a torch.Tensor"),
        ({"weight": torch.ones(5)}, r"weight: got shape \(5,\); expected \(4,\), the last dimension of x"),
        ({"weight": torch.ones(4, device="meta")}, r"weight: got a tensor on meta; expected cpu, where x is"),
        ({"bias": torch.ones(1)}, r"bias: got shape \(1,\); expected \(4,\)"),
        ({"residual": torch.ones(4)}, r"residual: got shape \(4,\); expected \(2, 4\), the shape of x"),
        ({"eps": -1.0}, r"eps: got -1.0; expected a number >= 0"),
        ({"eps": float("nan")}, r"eps: got nan"),
        ({"eps": None}, r"eps: got NoneType; expected a number"),
        ({"eps": torch.tensor(1e-5)}, r"eps: got Tensor; expected a number"),
        ({"dropout_p": None}, r"dropout_p: got NoneType; expected a number"),
        ({"x": None}, r"x: got None; expected a torch.Tensor"),
        ({"weight": None}, r"weight: got None; expected a torch.Tensor"),
        ({"x1": torch.ones(2, 3)}, r"x1: got shape \(2, 3\); expected \(2, 4\), the shape of x"),
        ({"weight1": torch.ones(3)}, r"weight1: got shape \(3,\); expected \(4,\)"),
        ({"bias1": torch.ones(4)}, r"bias1: got a tensor without weight1; expected weight1 too"),
        ({"rowscale": torch.ones(4)}, r"rowscale: got shape \(4,\); expected \(2,\), the shape of x without"),
        ({"rowscale": torch.ones(2, requires_grad=True)}, r"rowscale: got a tensor that requires grad"),
        ({"layerscale": torch.ones(2)}, r"layerscale: got shape \(2,\); expected \(4,\)"),
        ({"dropout_p": 1.0}, r"dropout_p: got 1.0; expected a probability in \[0, 1\)"),
        ({"out_dtype": torch.int32}, r"out_dtype: got torch.int32; expected a floating-point dtype"),
        ({"out_dtype": "float32"}, r"out_dtype: got 'float32'; expected a floating-point dtype"),
        ({"out": torch.ones(4)}, r"out: got shape \(4,\); expected \(2, 4\), the shape of x"),
        ({"out": torch.ones(4, 2).t()}, r"out: got a tensor with gaps; expected a contiguous one"),
        (
            {"out": torch.ones(2, 4), "out_dtype": BF16},
            r"out: got torch.float32; expected torch.bfloat16, out_d",
        ),
        (
            {"out": torch.ones(2, 4), "weight": torch.ones(4, requires_grad=True)},
            r"out: got a call that autograd records",
        ),
        ({"residual_out": torch.ones(2, 4)}, r"residual_out: got a tensor; expected None without prenorm"),
        (
            {"residual_out": torch.ones(2, 4), "prenorm": True, "residual": torch.ones(2, 4, dtype=BF16)},
            r"residual_out: got torch.float32; expected torch.bfloat16, the dtype of the sum",
        ),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else "",
)
def test_rejected_arguments(norm, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        norm(**{**GOOD, **change})
    assert "Fix: " in str(error.value)


def test_rejected_by_modules() -> None:
    with pytest.raises(ValueError, match=r"hidden_size: got -1"):
        RMSNorm(-1)
    with pytest.raises(ValueError, match=r"hidden_size: got \(4,\)"):
        LayerNorm((4,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dropout_p: got 1.5"):
        LayerNorm(4, dropout_p=1.5)
    with pytest.raises(ValueError, match=r"dropout_p: got NoneType"):
        LayerNorm(4, dropout_p=None)  # type: ignore[arg-type]


def test_options_of_modules() -> None:
    x = torch.randn(6, 16)
    for module in (LayerNorm(16, dropout_p=0.5), RMSNorm(16, dropout_p=0.5)):
        assert not torch.equal(module(x), module(x)), "drops in training"
        assert torch.equal(module.eval()(x), module(x)), "and only there"
        assert "dropout_p=0.5" in repr(module)
    for kind in (LayerNorm, RMSNorm):
        centred = kind(16, zero_centered_weight=True)
        assert torch.equal(centred.weight, torch.zeros(16)) and "zero_centered_weight=True" in repr(centred)
        assert torch.equal(centred(x), kind(16)(x))
