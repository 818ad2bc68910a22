"""The cases that the GPU tests are made of, on the portable path: what they build is what they say."""

from __future__ import annotations

import pytest
import torch
from flash_attn_kernels.testing.attention_case import LAYOUTS, AttentionCase, make_tensors, with_strides
from flash_attn_kernels.testing.attention_check import check_attention

EVERYTHING = {
    "head_dims": (8, 12),
    "lengths": ((9, 21), (9, 21)),
    "causal": True,
    "softcap": 2.0,
    "dropout_p": 0.2,
    "attn_bias": "hk",
    "attn_mask": "qk",
    "key_padding": True,
    "alibi_slopes": "bh",
    "sink_dtype": torch.float32,
    "page_size": 3,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_everything_at_once_in_every_layout(layout: str, dtype: torch.dtype) -> None:
    case = AttentionCase(dtype=dtype, layout=layout, **EVERYTHING)
    results = check_attention(case, "cpu", strict=False)
    assert make_tensors(case, "cpu").k.isnan().any(), "some keys are hidden, and those hold NaN"
    gradients = {"dq", "dk", "dv", "dattn_bias", "dalibi_slopes", "dlearnable_sink"}
    assert set(results) == {"out", "lse"} | (set() if case.is_paged else gradients)


@pytest.mark.parametrize("strides", ["transposed", "padded", "misaligned", "every other"])
def test_strides_change_no_value(strides: str) -> None:
    x = torch.randn(2, 5, 3, 8).half()
    y = with_strides(x, strides)
    assert torch.equal(x, y) and x.stride() != y.stride()
    misaligned = any(n * y.element_size() % 16 for n in (y.storage_offset(), *y.stride()[:-1]))
    assert misaligned == (strides == "misaligned")


def test_rows_that_must_not_be_read_hold_nan() -> None:
    lengths = ((3, 40), (0, 2), (5, 17))
    tensors = make_tensors(AttentionCase(lengths=lengths, layout="paged seqused"), "cpu")
    assert tensors.q[:, 0, 0].isfinite().sum() == 8
    assert tensors.k[..., 0, 0].isfinite().sum() == 40 + 2 + 17 - 16, "the last shares a page with the first"
    table = tensors.layout["block_table"]
    assert table[0, 0] == table[2, 0] and (table[1, 1:] == -1).all()


def test_wrong_cases_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layout: got 'ragged'.*dense"):
        AttentionCase(layout="ragged")
    with pytest.raises(ValueError, match=r"lengths: got .*expected equal lengths"):
        AttentionCase(lengths=((1, 2), (3, 4)))
