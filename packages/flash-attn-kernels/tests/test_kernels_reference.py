"""The definition against other ways to write the same thing: PyTorch, one element at a time, autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flash_attn_kernels.inputs import ScoreModifiers
from flash_attn_kernels.options import AttentionOptions
from flash_attn_kernels.reference import attention_reference, visibility
from torch import Tensor

INF = float("inf")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tensors(seqlen_q: int, seqlen_k: int, heads: int = 4, kv_heads: int = 2) -> list[Tensor]:
    shapes = ((2, seqlen_q, heads, 8), (2, seqlen_k, kv_heads, 8), (2, seqlen_k, kv_heads, 6))
    return [randn(*shape, seed=i) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_pytorchs_attention(with_bias: bool) -> None:
    q, k, v = tensors(9, 13)
    bias, mask = randn(2, 1, 9, 13, seed=4), randn(1, 4, 9, 13, seed=5) < 1.0
    mask[..., 0] = True
    modifiers = ScoreModifiers(attn_bias=bias) if with_bias else ScoreModifiers(attn_mask=mask)
    out = attention_reference(q, k, v, AttentionOptions(0.3), modifiers=modifiers).out
    expected = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        attn_mask=bias if with_bias else mask,
        scale=0.3,
        enable_gqa=True,
    )
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("top_left", [False, True])
def test_one_element_at_a_time(top_left: bool) -> None:
    """Softcap acts on the scaled product alone; bias, ALiBi and the sink come after it, then what is invisible goes."""
    options = AttentionOptions(-0.8, 2, 1, softcap=1.3, top_left=top_left)
    q, k, v = tensors(4, 6)
    modifiers = ScoreModifiers(
        attn_bias=randn(2, 4, 4, 6, seed=6),
        attn_mask=randn(2, 4, 4, 6, seed=7) < 0.8,
        key_padding_mask=randn(2, 6, seed=8) < 0.8,
        alibi_slopes=randn(2, 4, seed=9),
        learnable_sink=randn(4, seed=10),
    )
    assert modifiers.attn_bias is not None and modifiers.attn_mask is not None
    assert modifiers.key_padding_mask is not None
    assert modifiers.alibi_slopes is not None and modifiers.learnable_sink is not None
    result = attention_reference(q, k, v, options, modifiers=modifiers)
    shift = 0 if top_left else 2
    for b in range(2):
        for h in range(4):
            sink = math.exp(modifiers.learnable_sink[h])
            for i in range(4):
                weights = [0.0] * 6
                for j in range(6):
                    visible = i + shift - 2 <= j <= i + shift + 1
                    if visible and modifiers.attn_mask[b, h, i, j] and modifiers.key_padding_mask[b, j]:
                        score = 1.3 * math.tanh(-0.8 * float(q[b, i, h] @ k[b, j, h // 2]) / 1.3)
                        score += float(modifiers.attn_bias[b, h, i, j])
                        weights[j] = math.exp(
                            score - float(modifiers.alibi_slopes[b, h]) * abs(i + shift - j)
                        )
                denominator = sink + sum(weights)
                probabilities = torch.tensor(weights, dtype=torch.float64) / denominator
                torch.testing.assert_close(result.probabilities[b, h, i], probabilities)
                torch.testing.assert_close(result.out[b, i, h], probabilities @ v[b, :, h // 2])
                assert math.isclose(result.lse[b, h, i], math.log(denominator), rel_tol=1e-12, abs_tol=1e-12)


@pytest.mark.parametrize("lengths", [(4, 7), (7, 4), (5, 5), (1, 3)])
def test_visibility_by_hand(lengths: tuple[int, int]) -> None:
    seqlen_q, seqlen_k = lengths
    for top_left in (False, True):
        options = AttentionOptions(1.0, 1, 2, top_left=top_left)
        visible = visibility(options, seqlen_q, seqlen_k, torch.device("cpu"))
        for i in range(seqlen_q):
            diagonal = i if top_left else i + seqlen_k - seqlen_q
            assert visible[i].tolist() == [diagonal - 1 <= j <= diagonal + 2 for j in range(seqlen_k)]


def test_a_sink_is_one_more_key_with_value_zero() -> None:
    q, k, v = tensors(5, 7, heads=2)
    sink = randn(2, seed=3).requires_grad_()
    options = AttentionOptions(0.4)
    ours = attention_reference(q, k, v, options, modifiers=ScoreModifiers(learnable_sink=sink))
    longer_k, longer_v = (torch.cat([x, torch.zeros_like(x[:, :1])], dim=1) for x in (k, v))
    bias = F.pad(sink.reshape(1, 2, 1, 1), (7, 0)).expand(1, 2, 5, 8)
    expected = attention_reference(q, longer_k, longer_v, options, modifiers=ScoreModifiers(attn_bias=bias))
    for a, b in ((ours.out, expected.out), (ours.lse, expected.lse)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        gradients = [torch.autograd.grad(x.square().sum(), sink, retain_graph=True)[0] for x in (a, b)]
        torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("garbage", [float("nan"), INF])
def test_padded_keys_may_hold_anything(garbage: float) -> None:
    q, k, v = tensors(5, 7)
    real = randn(2, 7, seed=3) < 0.5
    real[:, 2] = True
    options, modifiers = AttentionOptions(0.4, window_right=0), ScoreModifiers(key_padding_mask=real)

    def results(k: Tensor, v: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        result = attention_reference(*leaves, options, modifiers=modifiers)
        return [*result, *torch.autograd.grad([result.out.sum(), result.probabilities.sum()], leaves)]

    hidden = ~real[:, :, None, None]
    for a, b in zip(
        results(k.masked_fill(hidden, garbage), v.masked_fill(hidden, garbage)), results(k, v), strict=True
    ):
        assert torch.equal(a, b)
    assert (results(k, v)[-1][~real] == 0).all()


@pytest.mark.parametrize(
    "options, modifiers",
    [
        (AttentionOptions(0.5, window_right=0), {}),  # the first rows of Sq > Sk
        (AttentionOptions(0.5), {"attn_mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool)}),
        (AttentionOptions(0.5), {"attn_bias": torch.full((1, 1, 1, 1), -INF)}),
        (AttentionOptions(0.5), {"key_padding_mask": torch.zeros(2, 3, dtype=torch.bool)}),
    ],
    ids=["window", "mask", "bias", "padding"],
)
@pytest.mark.parametrize("with_sink", [False, True])
def test_rows_that_see_nothing(options: AttentionOptions, modifiers: dict[str, Any], with_sink: bool) -> None:
    sink = randn(4).requires_grad_()
    leaves = [x.requires_grad_() for x in tensors(6, 3)]
    if with_sink:
        modifiers = {**modifiers, "learnable_sink": sink}
    out, lse, probabilities = attention_reference(*leaves, options, modifiers=ScoreModifiers(**modifiers))
    assert (out[:, :3] == 0).all() and (probabilities[:, :, :3] == 0).all()
    expected = sink.reshape(1, 4, 1).expand(2, 4, 3) if with_sink else torch.full((2, 4, 3), -INF)
    torch.testing.assert_close(lse[:, :, :3], expected.to(lse.dtype))
    dq, dk, dv = torch.autograd.grad([out.sum(), lse.exp().sum()], leaves)
    assert (dq[:, :3] == 0).all() and all(g.isfinite().all() for g in (dq, dk, dv))


def test_empty_sequences() -> None:
    for lengths in ((0, 3), (3, 0), (0, 0)):
        leaves = [x.requires_grad_() for x in tensors(*lengths)]
        out, lse, _ = attention_reference(*leaves, AttentionOptions(0.5))
        assert (out == 0).all() and (lse == -INF).all()
        assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_large_logits(dtype: torch.dtype) -> None:
    leaves = [x.to(dtype).requires_grad_() for x in tensors(6, 9)]
    bias = (1e4 * randn(1, 4, 6, 9, seed=5).sign()).to(dtype).requires_grad_()
    modifiers = ScoreModifiers(attn_bias=bias)
    result = attention_reference(*leaves, AttentionOptions(1e3), modifiers=modifiers, compute_dtype=dtype)
    assert all(x.isfinite().all() for x in result)
    gradients = torch.autograd.grad([result.out.sum(), result.lse.sum()], [*leaves, bias])
    assert all(g.isfinite().all() for g in gradients)


def test_gradcheck_of_everything() -> None:
    options = AttentionOptions(0.6, window_left=4, window_right=1, softcap=1.5, dropout_p=0.25)
    mask, keep = randn(2, 1, 4, 5, seed=6) < 1.0, randn(2, 4, 4, 5, seed=7) < 0.7
    leaves = [*tensors(4, 5), randn(1, 4, 4, 1, seed=8), randn(2, 4, seed=9), randn(4, seed=10)]

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, slopes: Tensor, sink: Tensor) -> Any:
        modifiers = ScoreModifiers(bias, mask, alibi_slopes=slopes, learnable_sink=sink)
        return attention_reference(q, k, v, options, modifiers=modifiers, keep_mask=keep)[:2]

    assert torch.autograd.gradcheck(attend, [x.requires_grad_() for x in leaves])


def test_dtypes_of_the_results() -> None:
    q, k, v = (x.bfloat16() for x in tensors(3, 3))
    for compute_dtype in (torch.float64, torch.float32, torch.bfloat16):
        out, lse, probabilities = attention_reference(
            q, k, v, AttentionOptions(1.0), compute_dtype=compute_dtype
        )
        assert (out.dtype, lse.dtype, probabilities.dtype) == (torch.bfloat16, compute_dtype, compute_dtype)
