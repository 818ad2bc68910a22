"""The public functions on a GPU: which path runs, what they return, autocast, partial gradients, merging."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from flash_attn_kernels import explain, flash_attn_func, flash_attn_varlen_func, merge_attention_states
from flash_attn_kernels.testing.attention_case import AttentionCase, make_tensors
from flash_attn_kernels.testing.attention_check import (
    assert_results_obey_the_law,
    public_results,
)

pytestmark = pytest.mark.gpu

EVERYTHING = {
    "causal": True, "softcap": 5.0, "dropout_p": 0.17, "attn_bias": "hqk", "attn_mask": "bqk", "key_padding": True,
    "alibi_slopes": "bh", "sink_dtype": torch.float32,
}  # fmt: skip


@pytest.mark.parametrize("layout", ["dense", "packed", "seqused", "paged"])
def test_explain_names_the_kernels_of_every_feature(layout: str) -> None:
    tensors = make_tensors(AttentionCase(layout=layout, **EVERYTHING))
    chosen = explain(tensors.q, tensors.k, tensors.v, **tensors.arguments)
    assert chosen.path == "sm80" and "attn_bias is given" in chosen.reasons["sm90"]


PORTABLE_CASES = {
    "is above 256": AttentionCase(head_dims=(264, 64), lengths=((70, 90), (70, 90))),
    "in no fixed order": AttentionCase(attn_bias="qk", lengths=((70, 90), (70, 90)), deterministic=True),
    "through paged keys": AttentionCase(layout="paged", lengths=((70, 90), (70, 90))),
}


@pytest.mark.parametrize("reason", PORTABLE_CASES)
def test_the_portable_path_runs_the_rest_and_is_named(reason: str) -> None:
    case = PORTABLE_CASES[reason]
    tensors = make_tensors(case)
    leaves = {"q": tensors.q, "k": tensors.k, "v": tensors.v, **tensors.modifiers}
    for leaf in leaves.values():
        leaf.requires_grad_()
    arguments = {**tensors.arguments, **leaves}
    explanation = explain(**arguments)
    assert explanation.path == "portable" and reason in str(explanation)
    attend = flash_attn_varlen_func if case.is_paged else flash_attn_func
    with pytest.raises(ValueError, match=f"strict.*{reason}"):
        attend(**arguments, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # one warning for each reason and process: another test may have seen it
        out, lse = attend(**arguments, return_lse=True)
    gradients = torch.autograd.grad([out, lse], list(leaves.values()), [tensors.dout, tensors.dlse])
    results = {"out": out, "lse": lse}
    if case.is_paged:
        assert all(gradient.isfinite().all() for gradient in gradients)
    else:
        results |= {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    assert_results_obey_the_law(results, make_tensors(replace(case, deterministic=False)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_runs_the_kernels(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 2, 100, 4, 64, device="cuda").requires_grad_().unbind()
    with torch.autocast("cuda", dtype=dtype):
        out = flash_attn_func(q, k, v, causal=True, strict=True)
    assert out.dtype == dtype
    assert torch.equal(out, flash_attn_func(*(x.to(dtype) for x in (q, k, v)), causal=True, strict=True))
    (dq,) = torch.autograd.grad(out.float().square().sum(), q)
    assert dq.dtype == torch.float32 and dq.isfinite().all()


@pytest.mark.parametrize(
    "wanted", [("q",), ("k",), ("v",), ("attn_bias",), ("alibi_slopes",), ("learnable_sink",)]
)
def test_gradients_of_some_inputs_only(wanted: tuple[str, ...]) -> None:
    tensors = make_tensors(AttentionCase(**EVERYTHING))
    leaves = {"q": tensors.q, "k": tensors.k, "v": tensors.v, **tensors.modifiers}
    leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in leaves.items()}
    torch.manual_seed(0)
    out, lse = flash_attn_func(**{**tensors.arguments, **leaves}, return_lse=True, strict=True)
    gradients = torch.autograd.grad(
        [out, lse], [leaves[name] for name in wanted], [tensors.dout, tensors.dlse]
    )
    names = [f"d{name}" for name in wanted]
    assert_results_obey_the_law(dict(zip(names, gradients, strict=True)), tensors)


def test_gradients_through_the_lse_alone_and_the_output_alone() -> None:
    for silent in ("dout", "dlse"):
        tensors = make_tensors(AttentionCase(**EVERYTHING))
        setattr(tensors, silent, torch.zeros_like(getattr(tensors, silent)))
        leaves = [x.detach().requires_grad_() for x in (tensors.q, tensors.k, tensors.v)]
        torch.manual_seed(0)
        out, lse = flash_attn_func(*leaves, **tensors.arguments, return_lse=True, strict=True)
        through, upstream = (lse, tensors.dlse) if silent == "dout" else (out, tensors.dout)
        # v has no gradient through the LSE, which autograd of the definition gives as zeros.
        gradients = torch.autograd.grad(through, leaves, upstream)
        assert_results_obey_the_law(dict(zip(("dq", "dk", "dv"), gradients, strict=True)), tensors)


def test_no_gradient_needed_gives_the_same_bits() -> None:
    tensors = make_tensors(AttentionCase(**EVERYTHING))
    expected = public_results(tensors)
    torch.manual_seed(0)
    with torch.no_grad():
        out = flash_attn_func(tensors.q, tensors.k, tensors.v, **tensors.arguments, strict=True)
    assert not out.requires_grad and torch.equal(out, expected["out"])


@pytest.mark.parametrize("shape", [(0, 5, 4, 64), (2, 0, 4, 64)], ids=["batch", "seqlen"])
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    q, k, v = (torch.empty(shape, device="cuda", dtype=torch.float16, requires_grad=True) for _ in range(3))
    out, lse = flash_attn_func(q, k, v, return_lse=True)
    assert out.shape == shape and lse.shape == (shape[0], shape[2], shape[1])
    assert all(g.shape == shape for g in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_probabilities_are_those_of_the_output(dropout_p: float) -> None:
    q, k, v = torch.randn(3, 2, 90, 4, 64, device="cuda", dtype=torch.float16)
    torch.manual_seed(2)
    out, lse, probabilities = flash_attn_func(
        q, k, v, dropout_p, causal=True, return_attn_probs=True, strict=True
    )
    assert probabilities.shape == (2, 4, 90, 90) and lse.shape == (2, 4, 90)
    kept = probabilities.float().masked_fill(probabilities.signbit(), 0.0) / (1 - dropout_p)
    expected = torch.einsum("bhqk,bkhd->bqhd", kept, v.float())
    torch.testing.assert_close(out.float(), expected, atol=4e-3, rtol=4e-3)
    torch.testing.assert_close(probabilities.float().abs().sum(-1), torch.ones_like(lse), atol=4e-3, rtol=0.0)


def test_merged_parts_equal_the_whole() -> None:
    """Attention to two halves of the keys, merged, is attention to all of them, gradients included."""
    tensors = make_tensors(AttentionCase(lengths=((60, 200), (60, 200))))
    leaves = [x.detach().requires_grad_() for x in (tensors.q, tensors.k, tensors.v)]
    q, k, v = leaves
    parts = [
        flash_attn_func(q, k[:, rows], v[:, rows], return_lse=True, strict=True)
        for rows in (slice(0, 70), slice(70, None))
    ]
    out, lse = merge_attention_states([o for o, _ in parts], [x for _, x in parts])
    gradients = torch.autograd.grad([out, lse], leaves, [tensors.dout, tensors.dlse])
    results = {"out": out, "lse": lse, **{f"d{n}": g for n, g in zip("qkv", gradients, strict=True)}}
    assert_results_obey_the_law(results, tensors)


def test_positional_order_of_the_options() -> None:
    """FlashAttention-2.8's: dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic."""
    q, k, v = torch.randn(3, 1, 50, 2, 64, device="cuda", dtype=torch.float16)
    slopes = torch.ones(2, device="cuda")
    by_position = flash_attn_func(q, k, v, 0.0, 0.3, True, (9, 0), 2.0, slopes, True)
    by_name = flash_attn_func(
        q, k, v, softmax_scale=0.3, causal=True, window_size=(9, 0), softcap=2.0, alibi_slopes=slopes
    )
    assert torch.equal(by_position, by_name)


def test_two_backwards_through_one_graph() -> None:
    tensors = make_tensors(AttentionCase())
    leaves = [x.detach().requires_grad_() for x in (tensors.q, tensors.k, tensors.v)]
    out = flash_attn_func(*leaves, deterministic=True, strict=True)
    first, second = (torch.autograd.grad(out, leaves, tensors.dout, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
