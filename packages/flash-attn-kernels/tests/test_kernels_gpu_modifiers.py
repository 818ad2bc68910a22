"""What changes the scores, on the CUDA kernels: bias, masks, padding, ALiBi, sinks, scale, extreme logits."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from flash_attn_kernels import flash_attn_func
from flash_attn_kernels.reference import attention_reference
from flash_attn_kernels.testing import assert_within_reference_error
from flash_attn_kernels.testing.attention_case import AttentionCase, make_tensors
from flash_attn_kernels.testing.attention_check import (
    assert_results_obey_the_law,
    check_attention,
    check_tensors,
    public_results,
    reference_results,
)

pytestmark = pytest.mark.gpu

BROADCAST_PATTERNS = ["".join(p) for size in range(5) for p in itertools.combinations("bhqk", size)]
LENGTHS = ((130, 190), (130, 190))


@pytest.mark.parametrize("pattern", BROADCAST_PATTERNS)
@pytest.mark.parametrize("bias_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_bias_broadcast_over_any_dimensions(pattern: str, bias_dtype: torch.dtype) -> None:
    check_attention(AttentionCase(lengths=LENGTHS, attn_bias=pattern, bias_dtype=bias_dtype, causal=True))


@pytest.mark.parametrize("pattern", BROADCAST_PATTERNS)
def test_mask_broadcast_over_any_dimensions(pattern: str) -> None:
    check_attention(AttentionCase(lengths=LENGTHS, attn_mask=pattern, dtype=torch.float16))


@pytest.mark.parametrize("layout", ["dense", "packed"])
@pytest.mark.parametrize(
    "modifier",
    [
        {"key_padding": True},
        {"alibi_slopes": "h"},
        {"alibi_slopes": "bh"},
        {"sink_dtype": torch.bfloat16},
        {"softcap": 1.5},
        {"dropout_p": 0.3},
        {"softmax_scale": -0.2},
        {"softmax_scale": 0.0},
    ],
    ids=str,
)
def test_one_modifier_alone(modifier: dict[str, Any], layout: str) -> None:
    for dtype, causal, deterministic in itertools.product(
        [torch.float16, torch.bfloat16], [False, True], [False, True]
    ):
        case = AttentionCase(
            dtype=dtype,
            lengths=LENGTHS,
            layout=layout,
            causal=causal,
            deterministic=deterministic,
            **modifier,
        )
        check_attention(case)


@pytest.mark.parametrize(
    "shape", [(190,), (1, 190), (130, 1), (130, 190), (4, 130, 190), (4, 1, 1), (1, 1, 130, 190)]
)
def test_bias_of_fewer_dimensions_gets_its_gradient_in_its_shape(shape: tuple[int, ...]) -> None:
    full = (1,) * (4 - len(shape)) + shape
    pattern = "".join(letter for letter, size in zip("bhqk", full, strict=True) if size > 1)
    case = AttentionCase(lengths=LENGTHS, attn_bias=pattern, bias_dtype=torch.bfloat16)
    tensors = make_tensors(case)
    bias = tensors.modifiers["attn_bias"].reshape(shape).requires_grad_()
    out = flash_attn_func(tensors.q, tensors.k, tensors.v, attn_bias=bias, strict=True)
    (gradient,) = torch.autograd.grad(out, bias, tensors.dout)
    assert gradient.shape == bias.shape and gradient.dtype == bias.dtype
    tensors.dlse.zero_()
    assert_results_obey_the_law({"out": out, "dattn_bias": gradient.reshape(full)}, tensors)


MODIFIER_STRIDES = [
    (name, strides)
    for name in ("attn_bias", "attn_mask", "alibi_slopes", "learnable_sink", "key_padding_mask")
    for strides in ("expanded", "transposed", "every other")
    if (name, strides)
    != ("key_padding_mask", "expanded")  # other keys would be hidden than those that hold NaN
]


@pytest.mark.parametrize("name, strides", MODIFIER_STRIDES)
def test_modifiers_of_any_strides(name: str, strides: str) -> None:
    case = AttentionCase(
        lengths=((96, 96), (96, 96)), attn_bias="bhqk", attn_mask="bhqk", key_padding=True, alibi_slopes="bh",
        sink_dtype=torch.float32,
    )  # fmt: skip
    tensors = make_tensors(case)
    x = tensors.modifiers[name]
    if strides == "expanded":
        x = x[:1].expand(x.shape)
    elif strides == "transposed":
        x = x.movedim(-1, 0).contiguous().movedim(0, -1)
    else:
        x = torch.stack([x, x], dim=-1)[..., 0]
    tensors.modifiers[name] = x
    check_tensors(tensors)


@pytest.mark.parametrize("layout", ["dense", "packed"])
@pytest.mark.parametrize("sink_dtype", [None, torch.float32])
@pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask", "attn_bias"])
def test_rows_that_see_nothing(name: str, sink_dtype: torch.dtype | None, layout: str) -> None:
    case = AttentionCase(
        lengths=LENGTHS,
        layout=layout,
        attn_mask="bhqk",
        key_padding=True,
        attn_bias="bhqk",
        sink_dtype=sink_dtype,
    )
    tensors = make_tensors(case)
    hide = float("-inf") if name == "attn_bias" else False
    if name == "key_padding_mask":
        tensors.modifiers[name][1] = hide
        for x in (tensors.k, tensors.v):
            x[1 if layout == "dense" else slice(LENGTHS[0][1], None)] = float("nan")
    else:
        tensors.modifiers[name][1, :, 3:80] = hide
        tensors.modifiers[name][0, 0, :, 20:] = hide
    results = check_tensors(tensors)
    lse = reference_results(tensors, torch.float64)[
        "lse"
    ]  # exactly the sink's logit where nothing is visible
    nothing = lse == (float("-inf") if sink_dtype is None else tensors.modifiers["learnable_sink"][:, None])
    assert nothing.sum() >= 77 * 4
    out_per_lse = results["out"].transpose(-3, -2)
    assert (out_per_lse[nothing] == 0).all()


def test_causal_rows_above_the_diagonal_see_nothing() -> None:
    results = check_attention(AttentionCase(lengths=((300, 100),), causal=True, head_dims=(128, 128)))
    assert (results["out"][:, :200] == 0).all() and (results["lse"][:, :, :200] == float("-inf")).all()
    assert (results["dq"][:, :200] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("deterministic", [False, True])
def test_logits_of_ten_thousand(dtype: torch.dtype, deterministic: bool) -> None:
    for causal in (False, True):
        case = AttentionCase(
            dtype=dtype, lengths=((300, 300),), heads=(2, 2), causal=causal, deterministic=deterministic,
            softmax_scale=1.0,
        )  # fmt: skip
        tensors = make_tensors(case)
        tensors.q *= 36
        tensors.k *= 36
        results = public_results(tensors)
        exact, plain = (reference_results(tensors, x) for x in (torch.float64, dtype))
        assert exact["lse"].max() > 1e4
        # Plain arithmetic happens to be exact where one key has all the weight, so the law leaves no room. Scores in
        # base 2 reach 2e4 here, where fp32 numbers lie 2^-9 apart: a weight may be off by that much of itself.
        q, k, v = (x.double() for x in (tensors.q, tensors.k, tensors.v))
        weights = attention_reference(q, k, v, case.options).probabilities
        scale = {name: gradient.abs().max() for name, gradient in exact.items()}
        scale["lse"] = torch.tensor(1.0)
        scale["dv"] = (weights.transpose(-1, -2) @ tensors.dout.double().abs().transpose(1, 2)).max()
        for name, result in results.items():
            factor = 2.0 if name in ("out", "lse") else 3.0
            atol = 2.0**-9 * scale[name].item()
            assert_within_reference_error(
                result, exact[name], plain[name], factor=factor, atol=atol, name=name
            )


@pytest.mark.parametrize("offset", [-80.0, -90.0, -1000.0, -1e4, 1e4])
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_lse_far_from_zero(offset: float, layout: str) -> None:
    """exp(lse) leaves the range of fp32 below -88.7; a constant in the bias must change the LSE and nothing else."""
    case = AttentionCase(lengths=LENGTHS, layout=layout, attn_bias="bhqk", causal=True)
    shifted = make_tensors(case)
    shifted.modifiers["attn_bias"] += offset
    results = public_results(shifted)
    results["lse"] = results["lse"] - offset
    assert_results_obey_the_law(results, make_tensors(case))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_lse_far_below_zero_without_modifiers(head_dim: int) -> None:
    """The scale turns the large products of equal vectors into large negative scores."""
    case = AttentionCase(
        dtype=torch.float16,
        lengths=((200, 200),),
        heads=(2, 2),
        head_dims=(head_dim, head_dim),
        softmax_scale=-1.0,
    )
    tensors = make_tensors(case)
    tensors.q.abs_()
    tensors.k.abs_()
    tensors.q *= 8
    results = check_tensors(tensors)
    assert results["lse"].max() < -88.7


def test_minus_infinity_in_the_bias_hides_as_a_mask_does() -> None:
    case = AttentionCase(lengths=LENGTHS, attn_mask="bhqk", attn_bias="bhqk")
    tensors = make_tensors(case)
    visible = tensors.modifiers.pop("attn_mask")
    tensors.modifiers["attn_bias"].masked_fill_(~visible, float("-inf"))
    assert_results_obey_the_law(public_results(tensors), make_tensors(case))


OPTION_VALUES: dict[str, Any] = {
    "softmax_scale": 0.3,
    "causal": True,
    "window_size": (10, 20),
    "softcap": 1.0,
    "dropout_p": 0.2,
    "alibi_slopes": lambda: torch.full((4,), 0.1, device="cuda"),
    "attn_bias": lambda: torch.randn(64, 80, device="cuda"),
    "attn_mask": lambda: torch.rand(64, 80, device="cuda") < 0.5,
    "key_padding_mask": lambda: torch.rand(2, 80, device="cuda") < 0.5,
    "learnable_sink": lambda: torch.ones(4, device="cuda"),
}


@pytest.mark.parametrize("option", OPTION_VALUES)
def test_each_option_changes_the_output(option: str) -> None:
    tensors = make_tensors(AttentionCase(lengths=((64, 80), (64, 80))))
    qkv = tensors.q, tensors.k, tensors.v
    value = OPTION_VALUES[option]
    argument = {option: value() if callable(value) else value}
    changed = flash_attn_func(*qkv, **argument, strict=True)
    assert changed.isfinite().all()
    assert not torch.equal(changed, flash_attn_func(*qkv, strict=True))


def test_the_alignment_changes_the_output() -> None:
    tensors = make_tensors(AttentionCase(lengths=((64, 80),)))
    for mask in ({"causal": True}, {"window_size": (9, 9)}, {"alibi_slopes": torch.ones(4, device="cuda")}):
        top, bottom = (
            flash_attn_func(tensors.q, tensors.k, tensors.v, **mask, causal_alignment=alignment, strict=True)
            for alignment in ("top-left", "bottom-right")
        )
        assert not torch.equal(top, bottom)
