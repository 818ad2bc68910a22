"""The portable path over a pairwise-covering matrix of everything an attention call can ask for.

fp64 must equal the definition up to the order of summation; the other dtypes obey the tolerance law.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from flash_attn_kernels import blockwise, portable
from flash_attn_kernels.inputs import AttentionInputs, PackedLayout, ScoreModifiers
from flash_attn_kernels.philox import draw_seed_and_offset
from flash_attn_kernels.testing import assert_within_reference_error, pairwise
from flash_attn_kernels.testing.attention_case import AttentionCase, AttentionTensors, make_tensors
from flash_attn_kernels.testing.attention_check import Results, reference_results

MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (7, 3)},
    "left window": {"window_size": (5, -1)},
    "right window": {"window_size": (-1, 4)},
    "diagonal": {"window_size": (0, 0)},
    "causal top-left": {"causal": True, "causal_alignment": "top-left"},
    "window top-left": {"window_size": (9, 2), "causal_alignment": "top-left"},
}

OPTIONS: dict[str, list[Any]] = {
    "attn_bias": [None, "", "b", "h", "q", "k", "bh", "bq", "bk", "hq", "hk", "qk", "bhq", "bhk", "bqk", "hqk", "bhqk"],
    "mask": list(MASKS),
    # (Sq, Sk) of a dense call and of the sequences of a packed one
    "lengths": [
        ((31, 31), ((31, 31), (18, 18))),
        ((40, 23), ((40, 23), (0, 5), (1, 1), (5, 0), (19, 7))),
        ((23, 40), ((1, 30), (23, 40), (0, 0), (3, 3))),
        ((1, 1), ((0, 0), (1, 1), (0, 2), (0, 0), (1, 0))),
        ((1, 50), ((13, 17), (26, 34), (14, 18))),
        ((50, 1), ((50, 1),)),
    ],
    "head_dims": [(8, 8), (7, 7), (33, 33), (16, 24), (24, 16), (1, 1), (260, 12)],
    "layout": ["dense", "packed", "seqused", "paged", "paged seqused"],
    "attn_mask": [None, "bhqk", "qk", "bk", "hq"],
    "heads": [(4, 4), (6, 2), (5, 1), (3, 3)],
    "dtype": [torch.float64, torch.float32, torch.bfloat16, torch.float16],
    "softmax_scale": [None, 0.7, -0.4, 0.0],
    "page_size": [16, 1, 7],
    "bias_dtype": [torch.float32, torch.bfloat16, torch.float16],
    "alibi_slopes": [None, "h", "bh"],
    "sink_dtype": [None, torch.float32, torch.bfloat16],
    "strides": ["contiguous", "transposed", "every other"],
    "gradient_strides": ["contiguous", "transposed", "expanded"],
    "key_padding": [False, True],
    "softcap": [0.0, 1.5],
    "dropout_p": [0.0, 0.3],
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks in small problems, of sizes that divide nothing."""
    monkeypatch.setattr(blockwise, "QUERY_BLOCK", 13)
    monkeypatch.setattr(blockwise, "KEY_BLOCK", 17)


def make_case(seed: int, choice: dict[str, Any]) -> AttentionCase:
    fields = {name: value for name, value in choice.items() if name not in ("mask", "lengths")}
    dense, packed = choice["lengths"]
    lengths = (dense, dense) if choice["layout"] == "dense" else packed
    return AttentionCase(lengths=lengths, **fields, **MASKS[choice["mask"]], seed=seed)


def portable_results(tensors: AttentionTensors) -> Results:
    """Output, LSE and the gradients of everything that has one, straight from the path."""
    q, k, v, layout = tensors.q, tensors.k, tensors.v, tensors.layout
    modifiers = dict(tensors.modifiers)
    if "alibi_slopes" in modifiers:
        modifiers["alibi_slopes"] = modifiers["alibi_slopes"].reshape(-1, q.shape[-2])
    packed = None
    if layout:
        tables = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "block_table")
        packed = PackedLayout(**{name: layout[name] for name in tables if name in layout})
    torch.manual_seed(tensors.case.seed)
    seed_and_offset = draw_seed_and_offset(q.device)
    inputs = AttentionInputs(
        q, k, v, tensors.case.options, ScoreModifiers(**modifiers), seed_and_offset, packed
    )
    out, lse = portable.forward(inputs)
    needs = {f"needs_{name}": True for name in ("attn_bias", "alibi_slopes", "learnable_sink")}
    gradients = portable.backward(inputs, out, lse, tensors.dout, tensors.dlse.to(lse.dtype), **needs)
    results = {"out": out, "lse": lse}
    for name, x in {"q": q, "k": k, "v": v, **modifiers}.items():
        if x.is_floating_point():
            gradient = getattr(gradients, name)
            assert gradient.shape == x.shape and gradient.dtype == x.dtype, name
            results[f"d{name}"] = gradient.reshape(tensors.modifiers.get(name, x).shape)
    return results


@pytest.mark.parametrize("seed, choice", list(enumerate(pairwise(OPTIONS))))
def test_every_pair_of_options(seed: int, choice: dict[str, Any]) -> None:
    case = make_case(seed, choice)
    tensors = make_tensors(case, "cpu")
    if case.dtype == torch.float64:
        for name, x in tensors.modifiers.items():
            tensors.modifiers[name] = x.double() if x.is_floating_point() else x
    actual = portable_results(tensors)
    # The definition sees one sequence at a time and no pages, so it has the gradients of a paged call too.
    tensors.case = replace(case, layout="dense" if case.layout == "dense" else "packed")
    exact = reference_results(tensors, torch.float64)
    plain = None if case.dtype == torch.float64 else reference_results(tensors, case.dtype)
    assert actual.keys() == exact.keys()
    for name, result in actual.items():
        if plain is None:
            torch.testing.assert_close(
                result, exact[name], rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
            )
        else:
            factor, atol = (2.0, 1e-5) if name in ("out", "lse") else (3.0, 1e-4)
            assert_within_reference_error(
                result, exact[name], plain[name], factor=factor, atol=atol, name=name
            )
    for name in "qkv":
        unread = getattr(tensors, name).isnan()
        assert (actual[f"d{name}"][unread] == 0).all(), f"d{name}: rows that no query reads are not 0"
    if tensors.layout:
        outside = tensors.q[:, 0, 0].isnan()
        assert (actual["out"][outside] == 0).all() and (actual["lse"][:, outside] == float("-inf")).all()
