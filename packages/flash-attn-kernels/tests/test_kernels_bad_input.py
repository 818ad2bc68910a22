"""Misuse raises a ValueError that names the argument, what came, what is accepted, and the fix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flash_attn_kernels import explain, flash_attn_func, flash_attn_varlen_func

Q, K = torch.zeros(2, 5, 4, 8), torch.zeros(2, 7, 2, 8)
PACKED_Q, PACKED_K = torch.zeros(10, 4, 8), torch.zeros(14, 2, 8)
CU_Q, CU_K = torch.tensor([0, 4, 10], dtype=torch.int32), torch.tensor([0, 6, 14], dtype=torch.int32)

DENSE: list[tuple[str, dict[str, Any], str]] = [
    ("not a tensor", {"k": [1, 2]}, r"k: got list; expected a torch.Tensor"),
    (
        "rank of q",
        {"q": Q[0]},
        r"q: got shape \(5, 4, 8\); expected shape \(batch, seqlen, heads, head_dim\)",
    ),
    ("rank of v", {"v": K[0]}, r"v: got shape \(7, 2, 8\)"),
    (
        "dtype of k",
        {"k": K.half()},
        r"k: got dtype torch.float16; expected the dtype of q, torch.float32.*cast",
    ),
    ("device of v", {"v": K.to("meta")}, r"v: got device meta; expected the device of q, cpu"),
    (
        "integer inputs",
        {"q": Q.long(), "k": K.long(), "v": K.long()},
        r"q: got dtype torch.int64; expected a floating",
    ),
    ("length of v", {"v": K[:, :3]}, r"v: got shape \(2, 3, 2, 8\); expected the leading shape of k"),
    ("heads of v", {"v": torch.zeros(2, 7, 1, 8)}, r"v: got shape .* expected the leading shape of k"),
    ("head dim of k", {"k": torch.zeros(2, 7, 2, 6)}, r"k: got head_dim 6; expected the head_dim of q, 8"),
    ("batch of k", {"k": K[:1], "v": K[:1]}, r"k: got batch 1; expected the batch of q, 2"),
    (
        "heads",
        {"q": torch.zeros(2, 5, 3, 8)},
        r"q: got 3 heads; expected a multiple of the 2 heads of k and v",
    ),
    (
        "no kv heads",
        {"k": K[:, :, :0], "v": K[:, :, :0]},
        r"q: got 4 heads; expected a multiple of the 0 heads",
    ),
    (
        "swapped layout",
        {"q": torch.zeros(2, 4, 7, 8), "k": torch.zeros(2, 4, 5, 8), "v": torch.zeros(2, 4, 5, 8)},
        r"q: got 7 heads.*transpose\(1, 2\)",
    ),
    ("negative dropout", {"dropout_p": -0.1}, r"dropout_p: got -0.1; expected a probability in \[0, 1\)"),
    ("certain dropout", {"dropout_p": 1.0}, r"dropout_p: got 1.0"),
    ("NaN scale", {"softmax_scale": float("nan")}, r"softmax_scale: got nan; expected a finite number"),
    ("infinite softcap", {"softcap": float("inf")}, r"softcap: got inf"),
    ("negative softcap", {"softcap": -1.0}, r"softcap: got -1.0; expected a finite number >= 0"),
    (
        "window below -1",
        {"window_size": (-2, 0)},
        r"window_size: got \(-2, 0\); expected \(left, right\) integers",
    ),
    ("window of one", {"window_size": (3,)}, r"window_size: got \(3,\)"),
    ("fractional window", {"window_size": (1.5, 2)}, r"window_size: got \(1.5, 2\)"),
    (
        "slopes shape",
        {"alibi_slopes": torch.ones(3)},
        r"alibi_slopes: got shape \(3,\); expected \(4,\) or \(2, 4\)",
    ),
    ("slopes device", {"alibi_slopes": torch.ones(4, device="meta")}, r"alibi_slopes: got device meta"),
]


@pytest.mark.parametrize("arguments, message", [pytest.param(*case[1:], id=case[0]) for case in DENSE])
@pytest.mark.parametrize("function", [flash_attn_func, explain])
def test_dense(function, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        function(**{"q": Q, "k": K, "v": K, **arguments})
    assert "Fix: " in str(error.value)


PACKED: list[tuple[str, dict[str, Any], str]] = [
    ("rank of q", {"q": Q}, r"q: got shape \(2, 5, 4, 8\); expected shape \(total_tokens, heads, head_dim\)"),
    ("cu dtype", {"cu_seqlens_q": CU_Q.long()}, r"cu_seqlens_q: got dtype torch.int64; expected torch.int32"),
    ("cu list", {"cu_seqlens_q": [0, 4, 10]}, r"cu_seqlens_q: got list; expected an int32 tensor"),
    ("cu rank", {"cu_seqlens_k": CU_K[None]}, r"cu_seqlens_k: got shape \(1, 3\); expected an int32 tensor"),
    ("cu empty", {"cu_seqlens_q": CU_Q[:0]}, r"cu_seqlens_q: got shape \(0,\)"),
    (
        "cu device",
        {"cu_seqlens_k": CU_K.to("meta")},
        r"cu_seqlens_k: got device meta; expected the device of q",
    ),
    (
        "cu start",
        {"cu_seqlens_q": CU_Q + 1},
        r"cu_seqlens_q: got \[1, 5, 11\]; expected cumulative lengths that start",
    ),
    ("cu falls", {"cu_seqlens_q": CU_Q.flip(0) - 0}, r"cu_seqlens_q: got \[10, 4, 0\]"),
    (
        "cu too long",
        {"cu_seqlens_k": CU_K * 2},
        r"cu_seqlens_k: got a total of 28; expected at most 14 tokens",
    ),
    (
        "cu counts",
        {"cu_seqlens_k": CU_K[:2]},
        r"cu_seqlens_k: got 1 sequences; expected the 2 of cu_seqlens_q",
    ),
    ("probabilities", {"return_attn_probs": True}, r"return_attn_probs: got True; expected False for packed"),
    (
        "page table dtype",
        {"k": K, "v": K, "block_table": torch.zeros(2, 3)},
        r"block_table: got dtype torch.float32",
    ),
    (
        "page table rows",
        {"k": K, "v": K, "block_table": torch.zeros(3, 3, dtype=torch.int32)},
        r"block_table: got shape \(3, 3\); expected \(2, max_pages\)",
    ),
    (
        "pages rank",
        {"block_table": torch.zeros(2, 3, dtype=torch.int32)},
        r"k: got shape .* expected shape \(num_pages",
    ),
]


@pytest.mark.parametrize("arguments, message", [pytest.param(*case[1:], id=case[0]) for case in PACKED])
def test_packed(arguments: dict[str, Any], message: str) -> None:
    defaults = {"q": PACKED_Q, "k": PACKED_K, "v": PACKED_K, "cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K}
    with pytest.raises(ValueError, match=message) as error:
        flash_attn_varlen_func(**{**defaults, **arguments})
    assert "Fix: " in str(error.value)
