"""Tiny calls that run every variant of the CUDA kernels once, for tools that slow a kernel down a hundred times.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck \\
        python -m pytest -m gpu -k sanitizer packages/flash-attn-kernels/tests

(with the variable since memory of the caching allocator ends where its blocks do, not where tensors do), and likewise
with ``--tool synccheck`` (barriers, which the sm90 kernels have many of). ``--tool racecheck`` is for the sm80 kernels,
``-k "sanitizer and sm80"`` on Hopper: it takes no notice of mbarriers, through which the roles of an sm90 block hand
each other descriptions of tiles, and reports those. Without such a tool these tests say little: the others compare
results. On Hopper the sm90 forward runs all kinds but "general" and "broadcast bias", dense and packed, where rows are
aligned and head dims multiples of 8; the fixture `kernels` has the sm80 kernels run all of it as well.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flash_attn_kernels.testing.attention_case import AttentionCase, make_tensors
from flash_attn_kernels.testing.attention_check import public_results

pytestmark = pytest.mark.gpu

HEAD_DIMS = [
    (32, 32), (64, 64), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128), (64, 128), (128, 64), (33, 7),
]  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window and sink": {"window_size": (40, 30), "sink_dtype": torch.float32},
    "softcap and sink": {"softcap": 3.0, "sink_dtype": torch.float32},
    "general": {
        "window_size": (40, 30), "softcap": 3.0, "dropout_p": 0.2, "attn_bias": "bhqk", "attn_mask": "hqk",
        "key_padding": True, "alibi_slopes": "bh", "sink_dtype": torch.float32,
    },
    "broadcast bias": {"attn_bias": "hk"},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dims", HEAD_DIMS)
def test_sanitizer(head_dims: tuple[int, int], kind: str, dtype: torch.dtype, kernels: str) -> None:
    for layout, deterministic, strides in (
        ("dense", False, "contiguous"),
        ("dense", True, "misaligned"),
        ("seqused", False, "padded"),
        ("paged", False, "contiguous"),
    ):
        lengths = ((67, 131), (67, 131)) if layout == "dense" else ((67, 131), (0, 3), (1, 70))
        case = AttentionCase(
            dtype=dtype, head_dims=head_dims, heads=(2, 1), lengths=lengths, layout=layout, strides=strides,
            deterministic=deterministic, **KINDS[kind],
        )  # fmt: skip
        results = public_results(make_tensors(case))
        assert not any(x.isnan().any() for x in results.values())


@pytest.mark.parametrize("kind", ["plain", "causal", "window and sink", "softcap and sink"])
@pytest.mark.parametrize("head_dims", [(64, 64), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128)])
def test_sanitizer_where_blocks_compute_several_tiles(head_dims: tuple[int, int], kind: str) -> None:
    """Barriers change their parity, stages are used again, and tiles of different lengths are shared out. Packed
    queries are as many as the sm90 backward wants."""
    heads = torch.cuda.get_device_properties(0).multi_processor_count // 2 + 2
    for layout, lengths in (("dense", ((67, 400),) * 2), ("packed", ((267, 400), (0, 3), (530, 70)))):
        case = AttentionCase(
            head_dims=head_dims, heads=(heads, 1), lengths=lengths, layout=layout, **KINDS[kind]
        )
        results = public_results(make_tensors(case))
        assert not any(x.isnan().any() for x in results.values())
