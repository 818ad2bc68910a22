"""The public functions: signatures, argument forms, and how they behave in autograd."""

from __future__ import annotations

import inspect
from functools import partial
from types import SimpleNamespace
from typing import Any

import flash_attn_kernels
import pytest
import torch
from flash_attn_kernels import (
    autograd,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    portable,
)
from flash_attn_kernels.autocast import autocast_is_on
from torch import Tensor
from torch.utils.checkpoint import checkpoint

OPTIONS = [
    "dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes", "deterministic",
    "return_attn_probs",
]  # fmt: skip
DEFAULTS = {
    "dropout_p": 0.0, "softmax_scale": None, "causal": False, "window_size": (-1, -1), "softcap": 0.0,
    "alibi_slopes": None, "deterministic": False, "return_attn_probs": False, "block_table": None,
    "causal_alignment": "bottom-right", "return_lse": False, "strict": False, "num_heads_q": None,
}  # fmt: skip
BEYOND = [
    "attn_bias", "attn_mask", "key_padding_mask", "learnable_sink", "causal_alignment", "return_lse", "strict",
]  # fmt: skip
USED = ["seqused_q", "seqused_k"]
LENGTHS = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]


@pytest.mark.parametrize(
    "function, positional, keyword_only",
    [
        (flash_attn_func, ["q", "k", "v", *OPTIONS], BEYOND),
        (flash_attn_qkvpacked_func, ["qkv", *OPTIONS], [*BEYOND, "num_heads_q"]),
        (flash_attn_kvpacked_func, ["q", "kv", *OPTIONS], BEYOND),
        (flash_attn_varlen_func, ["q", "k", "v", *LENGTHS, *OPTIONS, "block_table"], USED + BEYOND),
        (
            flash_attn_varlen_qkvpacked_func,
            ["qkv", "cu_seqlens", "max_seqlen", *OPTIONS],
            [*USED, *BEYOND, "num_heads_q"],
        ),
        (flash_attn_varlen_kvpacked_func, ["q", "kv", *LENGTHS, *OPTIONS], USED + BEYOND),
    ],
)
def test_signatures_are_flash_attentions(function, positional: list[str], keyword_only: list[str]) -> None:
    parameters = inspect.signature(function).parameters.values()
    assert [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD] == positional
    assert [p.name for p in parameters if p.kind == p.KEYWORD_ONLY] == keyword_only
    assert {p.name: p.default for p in parameters if p.name in DEFAULTS}.items() <= DEFAULTS.items()


def test_public_names() -> None:
    for name in flash_attn_kernels.__all__:
        assert callable(getattr(flash_attn_kernels, name))


def tensors(dtype: torch.dtype = torch.float32, seqlen_k: int = 11) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 9, 4, 8), (2, seqlen_k, 2, 8), (2, seqlen_k, 2, 8))
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


CU_Q, CU_K = torch.tensor([0, 3, 18], dtype=torch.int32), torch.tensor([0, 5, 20], dtype=torch.int32)

ALL_OPTIONS: dict[str, Any] = {
    "dropout_p": 0.2, "softmax_scale": 0.5, "causal": True, "window_size": (6, 0), "softcap": 2.0,
    "alibi_slopes": torch.linspace(0, 1, 4), "deterministic": True,
    "attn_bias": torch.linspace(-1, 1, 4)[:, None, None],
    "attn_mask": torch.ones(1, 1) > 0, "learnable_sink": torch.linspace(-1, 1, 4), "causal_alignment": "top-left",
}  # fmt: skip


stack_parts = partial(torch.stack, dim=-3)
join_heads = partial(torch.cat, dim=-2)


def assert_same(
    function,
    packed: list[Tensor],
    separate,
    tensors: list[Tensor],
    together: Any = stack_parts,
    **options: Any,
) -> None:
    """Both functions give the same (out, lse, probabilities), and the gradient of each tensor of ``packed``."""
    results = []
    for attend, leaves in ((function, packed), (separate, tensors)):
        torch.manual_seed(3)
        out, lse, probabilities = attend(*leaves, **options, return_attn_probs=True)
        loss = out.sin().sum() + lse.masked_fill(lse.isinf(), 0.0).sum()
        results.append((out, lse, probabilities, torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(results[0][:3], results[1][:3])
    gradients = results[1][3]
    stacked = [together(gradients)] if len(packed) == 1 else [gradients[0], together(gradients[1:])]
    torch.testing.assert_close(list(results[0][3]), stacked)


@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["plain", "all options"])
def test_packed_tensors_are_the_separate_ones(options: dict[str, Any]) -> None:
    q, k, v = tensors()
    kv = torch.stack([k, v], dim=2).detach().requires_grad_()
    assert_same(flash_attn_kvpacked_func, [q, kv], flash_attn_func, [q, k, v], **options)
    qkv = torch.randn(2, 9, 3, 4, 8, requires_grad=True)
    parts = [x.detach().requires_grad_() for x in qkv.unbind(2)]
    assert_same(flash_attn_qkvpacked_func, [qkv], flash_attn_func, parts, **options)


@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["plain", "all options"])
@pytest.mark.parametrize(
    "used", [{}, {"seqused_q": torch.tensor([2, 9]).int(), "seqused_k": torch.tensor([2, 0]).int()}]
)
def test_packed_tensors_of_packed_sequences(options: dict[str, Any], used: dict[str, Tensor]) -> None:
    q, k, v = (x.detach().flatten(0, 1).requires_grad_() for x in tensors())
    kv = torch.stack([k, v], dim=1).detach().requires_grad_()

    def separate(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return flash_attn_varlen_func(q, k, v, CU_Q, CU_K, 15, 15, **options)

    def kvpacked(q: Tensor, kv: Tensor, **options: Any) -> Any:
        return flash_attn_varlen_kvpacked_func(q, kv, CU_Q, CU_K, 15, 15, **options)

    assert_same(kvpacked, [q, kv], separate, [q, k, v], **options, **used)
    qkv = torch.randn(18, 3, 4, 8, requires_grad=True)
    parts = [x.detach().requires_grad_() for x in qkv.unbind(1)]

    def one_length(*parts: Tensor, **options: Any) -> Any:
        return flash_attn_varlen_func(*parts, CU_Q, CU_Q, 15, 15, **options)

    def qkvpacked(qkv: Tensor, **options: Any) -> Any:
        return flash_attn_varlen_qkvpacked_func(qkv, CU_Q, 15, **options)

    assert_same(qkvpacked, [qkv], one_length, parts, **options, **used)


@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["plain", "all options"])
def test_heads_that_follow_each_other(options: dict[str, Any]) -> None:
    """Four of queries, two of keys and two of values in one tensor, dense and packed."""
    heads = torch.randn(2, 9, 8, 8, requires_grad=True)
    parts = [x.detach().requires_grad_() for x in heads.split([4, 2, 2], dim=2)]
    one = partial(flash_attn_qkvpacked_func, num_heads_q=4)
    assert_same(one, [heads], flash_attn_func, parts, join_heads, **options)

    def packed(heads: Tensor, **options: Any) -> Any:
        return flash_attn_varlen_qkvpacked_func(heads, CU_Q, 15, num_heads_q=4, **options)

    def apart(*parts: Tensor, **options: Any) -> Any:
        return flash_attn_varlen_func(*parts, CU_Q, CU_Q, 15, 15, **options)

    heads, *parts = (x.detach().flatten(0, 1).requires_grad_() for x in (heads, *parts))
    assert_same(packed, [heads], apart, parts, join_heads, **options)


def test_qkv_of_any_strides() -> None:
    """Also where its heads do not follow each other in memory."""
    qkv = torch.randn(2, 9, 4, 3, 8).transpose(2, 3).requires_grad_()
    parts = [x.detach().requires_grad_() for x in qkv.unbind(2)]
    assert_same(flash_attn_qkvpacked_func, [qkv], flash_attn_func, parts)


def test_what_is_returned() -> None:
    q, k, v = tensors()
    assert isinstance(flash_attn_func(q, k, v), Tensor)
    out, lse = flash_attn_func(q, k, v, return_lse=True)
    assert out.requires_grad and lse.requires_grad and lse.shape == (2, 4, 9)
    out, lse, probabilities = flash_attn_func(q, k, v, return_attn_probs=True)
    assert out.requires_grad and lse.requires_grad and not probabilities.requires_grad
    assert probabilities.shape == (2, 4, 9, 11)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 4, 9))
    rows = [x.detach().flatten(0, 1) for x in (q, k, v)]
    out, lse, probabilities = flash_attn_varlen_func(*rows, CU_Q, CU_K, return_attn_probs=True)
    assert lse.shape == (4, 18) and probabilities.shape == (2, 4, 15, 15)
    torch.testing.assert_close(probabilities[0, :, :3].sum(-1), torch.ones(4, 3))
    assert (probabilities[0, :, 3:] == 0).all() and (probabilities[0, ..., 5:] == 0).all()


@pytest.mark.parametrize(
    "shape", [(), (1,), (11,), (9, 1), (9, 11), (4, 9, 11), (2, 1, 1, 11), (2, 4, 9, 11)]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_bias_of_any_rank_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v = (x.detach() for x in tensors())
    bias = torch.randn(shape).to(dtype).requires_grad_()
    full = bias.detach().float().expand(2, 4, 9, 11).clone().requires_grad_()
    out, expected = flash_attn_func(q, k, v, attn_bias=bias), flash_attn_func(q, k, v, attn_bias=full)
    torch.testing.assert_close(out, expected)
    (gradient,) = torch.autograd.grad(out.square().sum(), bias)
    assert gradient.shape == bias.shape and gradient.dtype == dtype
    (of_full,) = torch.autograd.grad(expected.square().sum(), full)
    torch.testing.assert_close(gradient, of_full.sum_to_size(shape).to(dtype), rtol=0.02, atol=1e-5)
    mask = torch.rand(shape) > 0.3
    torch.testing.assert_close(
        flash_attn_func(q, k, v, attn_mask=mask), flash_attn_func(q, k, v, attn_mask=mask.expand(2, 4, 9, 11))
    )


def test_a_bias_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    received = []
    original = portable.forward
    monkeypatch.setattr(
        portable, "forward", lambda inputs: received.append(inputs.modifiers) or original(inputs)
    )
    bias, mask = torch.randn(11, 9).t(), torch.ones(4, 9, 11) > 0
    flash_attn_func(*tensors(), attn_bias=bias, attn_mask=mask)
    assert (
        received[0].attn_bias.shape == (1, 1, 9, 11) and received[0].attn_bias.data_ptr() == bias.data_ptr()
    )
    assert (
        received[0].attn_mask.shape == (1, 4, 9, 11) and received[0].attn_mask.data_ptr() == mask.data_ptr()
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_slopes_and_sinks_of_any_dtype(dtype: torch.dtype) -> None:
    q, k, v = (x.detach().bfloat16() for x in tensors())
    for shape in ((4,), (2, 4)):
        slopes = torch.linspace(0, 1, 8)[: 4 * len(shape)].reshape(shape).to(dtype).requires_grad_()
        sink = torch.linspace(-1, 1, 4).to(dtype).requires_grad_()
        out = flash_attn_func(q, k, v, alibi_slopes=slopes, learnable_sink=sink)
        for x, gradient in zip(
            (slopes, sink), torch.autograd.grad(out.float().sum(), (slopes, sink)), strict=True
        ):
            assert gradient.shape == x.shape and gradient.dtype == dtype and (gradient != 0).any()


def test_options_in_other_forms() -> None:
    q, k, v = (x.detach() for x in tensors())
    expected = flash_attn_func(q, k, v, softmax_scale=2.0, window_size=(3, 2))
    assert torch.equal(flash_attn_func(q, k, v, softmax_scale=2, window_size=[3, 2]), expected)
    scale = torch.tensor(2.0)
    assert torch.equal(flash_attn_func(q, k, v, softmax_scale=scale, window_size=(3, 2)), expected)
    scale.fill_(1.0)
    assert not torch.equal(flash_attn_func(q, k, v, softmax_scale=scale, window_size=(3, 2)), expected)


@pytest.mark.parametrize("hint", [None, 0, 1, 15, 4096])
def test_max_seqlen_is_a_hint(hint: int | None) -> None:
    rows = [x.detach().flatten(0, 1) for x in tensors()]
    expected = flash_attn_varlen_func(*rows, CU_Q, CU_K, 15, 15, causal=True)
    assert torch.equal(flash_attn_varlen_func(*rows, CU_Q, CU_K, hint, hint, causal=True), expected)


@pytest.mark.parametrize("lengths", [(0, 9, 11), (2, 0, 11), (2, 9, 0), (2, 0, 0), (0, 0, 0)])
def test_empty_tensors(lengths: tuple[int, int, int]) -> None:
    batch, seqlen_q, seqlen_k = lengths
    leaves = {
        "q": torch.randn(batch, seqlen_q, 4, 8), "k": torch.randn(batch, seqlen_k, 2, 8),
        "v": torch.randn(batch, seqlen_k, 2, 8), "attn_bias": torch.randn(batch, 4, seqlen_q, seqlen_k),
        "alibi_slopes": torch.rand(4), "learnable_sink": torch.randn(4),
    }  # fmt: skip
    leaves = {name: x.requires_grad_() for name, x in leaves.items()}
    mask = torch.ones(batch, seqlen_k, dtype=torch.bool)
    out, lse = flash_attn_func(**leaves, key_padding_mask=mask, return_lse=True)
    assert out.shape == (batch, seqlen_q, 4, 8) and lse.shape == (batch, 4, seqlen_q)
    found = torch.autograd.grad((out.sum() + lse.sum()), list(leaves.values()))
    for (name, leaf), gradient in zip(leaves.items(), found, strict=True):
        assert gradient.shape == leaf.shape
        # The LSE of rows without keys is the sink itself.
        assert (gradient == (batch * seqlen_q if name == "learnable_sink" else 0)).all(), name


@pytest.mark.parametrize("sequences", [0, 1, 3])
def test_empty_packed_tensors(sequences: int) -> None:
    leaves = [torch.randn(0, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    cu_seqlens = torch.zeros(sequences + 1, dtype=torch.int32)
    out, lse, probabilities = flash_attn_varlen_func(*leaves, cu_seqlens, cu_seqlens, return_attn_probs=True)
    assert out.shape == (0, 4, 8) and lse.shape == (4, 0) and probabilities.shape == (sequences, 4, 0, 0)
    for leaf, gradient in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert gradient.shape == leaf.shape


# Autograd


def test_nothing_is_kept_without_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autograd._Attention, "apply", None)
    q, k, v = tensors()
    with torch.no_grad():
        assert flash_attn_func(q, k, v).grad_fn is None
    with torch.inference_mode():
        assert flash_attn_func(q, k, v, attn_bias=torch.zeros(1, requires_grad=True)).is_inference()
    assert not flash_attn_func(
        q.detach(), k.detach(), v.detach(), learnable_sink=torch.zeros(4)
    ).requires_grad


@pytest.mark.parametrize("name", ["q", "k", "v", "attn_bias", "alibi_slopes", "learnable_sink"])
def test_a_gradient_of_one_tensor_alone(name: str) -> None:
    q, k, v = tensors()
    everything = {
        "q": q, "k": k, "v": v, "attn_bias": torch.randn(9, 11), "alibi_slopes": torch.rand(4),
        "learnable_sink": torch.randn(4),
    }  # fmt: skip
    everything = {key: x.detach().requires_grad_() for key, x in everything.items()}
    (expected,) = torch.autograd.grad(flash_attn_func(**everything).square().sum(), everything[name])
    alone = {key: x.detach().requires_grad_(key == name) for key, x in everything.items()}
    (gradient,) = torch.autograd.grad(flash_attn_func(**alone).square().sum(), alone[name])
    torch.testing.assert_close(gradient, expected)


def test_gradients_through_out_or_lse_or_both() -> None:
    leaves = tensors()
    out, lse = flash_attn_func(*leaves, return_lse=True)
    both = torch.autograd.grad(out.sum() + lse.sum(), leaves, retain_graph=True)
    of_out = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    of_lse = torch.autograd.grad(lse.sum(), leaves)
    for total, a, b in zip(both, of_out, of_lse, strict=True):
        torch.testing.assert_close(total, a + b)
    assert of_lse[2].abs().max() == 0


def test_the_same_tensors_twice() -> None:
    leaves = tensors()
    once = torch.autograd.grad(flash_attn_func(*leaves).sum(), leaves)
    out = flash_attn_func(*leaves)
    twice = torch.autograd.grad(out.sum() + flash_attn_func(*leaves).sum(), leaves, retain_graph=True)
    again = torch.autograd.grad(out.sum(), leaves)
    for one, two, three in zip(once, twice, again, strict=True):
        torch.testing.assert_close(two, 2 * one)
        torch.testing.assert_close(three, one)


@pytest.mark.parametrize("result", ["out", "lse", "both"])
@pytest.mark.parametrize("loss", [torch.sum, lambda x: x.square().sum()], ids=["linear", "square"])
@pytest.mark.parametrize("by_backward", [False, True])
def test_second_derivatives_are_refused(result: str, loss, by_backward: bool) -> None:
    """Not taken for 0, also where the upstream gradient is a constant, and by whatever function they are asked for."""
    leaves = tensors()
    sink = torch.zeros(4, requires_grad=True)
    for other in ((), (sink,)):
        out, lse = flash_attn_func(*leaves, learnable_sink=sink if other else None, return_lse=True)
        total = {"out": loss(out), "lse": loss(lse), "both": loss(out) + loss(lse)}[result]
        for x in (*leaves, *other):
            (found,) = torch.autograd.grad(total, x, create_graph=True, retain_graph=True)
            with pytest.raises(RuntimeError, match=r"attention has no second derivative: .* Fix: "):
                if by_backward:
                    (found.sum() + leaves[0].sum()).backward(retain_graph=True)
                else:
                    torch.autograd.grad(found.sum(), leaves[0], allow_unused=True, retain_graph=True)


def test_hessians_are_refused() -> None:
    q, k, v = (x.detach()[:1, :2, :2] for x in tensors())
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.functional.hessian(lambda q: flash_attn_func(q, k, v).sum(), q)


def test_create_graph_alone_changes_no_gradient() -> None:
    leaves = tensors()
    out, lse = flash_attn_func(*leaves, return_lse=True)
    loss = out.square().sum() + lse.sum()
    expected = torch.autograd.grad(loss, leaves, retain_graph=True)
    found = torch.autograd.grad(loss, leaves, create_graph=True)
    assert all(map(torch.equal, found, expected))
    (only,) = torch.autograd.grad(lse.sum(), leaves[1:2], create_graph=True)
    assert only.shape == leaves[1].shape


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_recomputes_the_same(use_reentrant: bool) -> None:
    leaves = tensors()
    options = {key: x for key, x in ALL_OPTIONS.items() if key != "deterministic"}

    def attend(*leaves: Tensor) -> Tensor:
        return flash_attn_func(*leaves, **options).square().sum()

    torch.manual_seed(1)
    expected_loss = attend(*leaves)
    expected = torch.autograd.grad(expected_loss, leaves)
    torch.manual_seed(1)
    loss = checkpoint(attend, *leaves, use_reentrant=use_reentrant)
    loss.backward()
    torch.testing.assert_close(loss, expected_loss)
    for leaf, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


def test_saved_tensors_pass_through_hooks() -> None:
    leaves = tensors()
    expected = torch.autograd.grad(flash_attn_func(*leaves).sum(), leaves)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x.clone(), lambda x: x):
        out = flash_attn_func(*leaves).sum()
    assert len(packed) == 5  # q, k, v, out and lse
    torch.testing.assert_close(torch.autograd.grad(out, leaves), expected)


def test_inputs_changed_before_the_backward_are_noticed() -> None:
    q, k, v = tensors()
    changed = q * 1.0
    out = flash_attn_func(changed, k, v)
    changed.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# Autocast


def test_autocast_computes_as_without_it_in_its_dtype() -> None:
    """Same bits: inside a path autocast must not lower the precision of anything."""
    leaves = tensors()
    bias = torch.randn(9, 11, requires_grad=True)
    lowered = [x.detach().bfloat16().requires_grad_() for x in leaves]
    expected = flash_attn_func(*lowered, attn_bias=bias, softcap=3.0)
    expected_gradients = torch.autograd.grad(expected.float().sum(), [*lowered, bias])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flash_attn_func(*leaves, attn_bias=bias, softcap=3.0)
        loss = out.float().sum()
        gradients = torch.autograd.grad(loss, [*leaves, bias])
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    for gradient, expected_gradient, leaf in zip(gradients, expected_gradients, [*leaves, bias], strict=True):
        assert gradient.dtype == leaf.dtype and torch.equal(gradient, expected_gradient.to(leaf.dtype))


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps", "xpu", "meta"])
def test_autocast_is_asked_of_every_kind_of_device(device: str) -> None:
    x = SimpleNamespace(device=torch.device(device), is_cpu=device == "cpu", is_cuda=device == "cuda")
    assert not autocast_is_on(x)
    for kind in ("cpu", "mps", "xpu"):
        with torch.autocast(kind, dtype=torch.bfloat16):
            assert autocast_is_on(x) == (kind == device)


def test_probabilities_under_autocast() -> None:
    """They belong to the lse that comes with them, so they are computed in its precision."""
    leaves = [x.detach() * 4.0 for x in tensors()]
    expected = flash_attn_func(*(x.bfloat16() for x in leaves), return_attn_probs=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = flash_attn_func(*leaves, return_attn_probs=True)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_autocast_brings_dtypes_together() -> None:
    q, k, v = tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert flash_attn_func(q, k.bfloat16(), v).dtype == torch.bfloat16
        assert flash_attn_func(q.double(), k.double(), v.double()).dtype == torch.float64
        with pytest.raises(ValueError, match=r"k: got dtype torch\.float64"):
            flash_attn_func(q, k.double(), v)
