"""Misuse raises a ValueError that names the argument, what came, what is accepted, and the fix."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from flash_attn_kernels import (
    explain,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    merge_attention_states,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)

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
        r"k: got 0 heads; expected at least 1 head",
    ),
    ("no heads", {"q": Q[:, :, :0]}, r"q: got 0 heads; expected at least 1 head"),
    (
        "no head dim",
        {"q": Q[..., :0], "k": K[..., :0], "v": K},
        r"q: got head_dim 0; expected a head_dim of at least 1",
    ),
    ("no head dim of v", {"v": K[..., :0]}, r"v: got head_dim 0"),
    (
        "8-bit inputs",
        {name: x.to(torch.float8_e4m3fn) for name, x in (("q", Q), ("k", K), ("v", K))},
        r"q: got dtype torch.float8_e4m3fn; expected a floating-point dtype: float16, bfloat16",
    ),
    (
        "swapped layout",
        {"q": torch.zeros(2, 4, 7, 8), "k": torch.zeros(2, 4, 5, 8), "v": torch.zeros(2, 4, 5, 8)},
        r"q: got 7 heads.*transpose\(1, 2\)",
    ),
    (
        "swapped layout of grouped heads",
        {"q": torch.zeros(2, 4, 7, 8), "k": torch.zeros(2, 2, 5, 8), "v": torch.zeros(2, 2, 5, 8)},
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
        "window of None",
        {"window_size": (None, None)},
        r"window_size: got \(None, None\); .*-1 for an unbounded",
    ),
    ("no window", {"window_size": None}, r"window_size: got None; expected \(left, right\) integers"),
    ("one number as a window", {"window_size": 4}, r"window_size: got 4"),
    ("infinite window", {"window_size": (float("inf"), 0)}, r"window_size: got \(inf, 0\)"),
    ("words as a window", {"window_size": ("left", "right")}, r"window_size: got \('left', 'right'\)"),
    ("window of 71 bits", {"window_size": [2**70, 0]}, r"window_size: got \(1180591620717411303424, 0\)"),
    ("no softcap", {"softcap": None}, r"softcap: got None; expected a number. Fix: pass 0.0 to switch"),
    ("no dropout", {"dropout_p": None}, r"dropout_p: got None; expected a number. Fix: pass 0.0 to switch"),
    (
        "word as a scale",
        {"softmax_scale": "auto"},
        r"softmax_scale: got 'auto'; expected a number. Fix: pass None",
    ),
    (
        "scale for each head",
        {"softmax_scale": torch.ones(4)},
        r"softmax_scale: got tensor\(.*expected a number",
    ),
    (
        "slopes shape",
        {"alibi_slopes": torch.ones(3)},
        r"alibi_slopes: got shape \(3,\); expected \(4,\) or \(2, 4\)",
    ),
    ("slopes device", {"alibi_slopes": torch.ones(4, device="meta")}, r"alibi_slopes: got device meta"),
    (
        "slopes dtype",
        {"alibi_slopes": torch.ones(4, dtype=torch.int64)},
        r"alibi_slopes: got dtype torch.int64; expected a floating-point dtype",
    ),
    ("slopes list", {"alibi_slopes": [1.0] * 4}, r"alibi_slopes: got list; expected a torch.Tensor"),
    (
        "bias shape",
        {"attn_bias": torch.zeros(3, 7)},
        r"attn_bias: got shape \(3, 7\); expected .*batch 2 or 1, heads 4 or 1, seqlen_q 5 or 1, seqlen_k 7 or 1",
    ),
    ("bias rank", {"attn_bias": torch.zeros(1, 1, 1, 1, 1)}, r"attn_bias: got shape \(1, 1, 1, 1, 1\)"),
    (
        "bias of swapped layout",
        {**dict.fromkeys("qkv", Q.transpose(1, 2)), "attn_bias": torch.zeros(2, 4, 5, 5)},
        r"attn_bias: got shape \(2, 4, 5, 5\).*transpose\(1, 2\)",
    ),
    (
        "bool bias",
        {"attn_bias": torch.ones(5, 7, dtype=torch.bool)},
        r"attn_bias: got dtype torch.bool; expected a floating-point dtype. Fix: pass a bool mask as attn_mask",
    ),
    (
        "bias of higher precision",
        {"attn_bias": torch.ones(5, 7, dtype=torch.float64)},
        r"attn_bias: got dtype torch.float64; expected float16, bfloat16 or float32 \(float64 with float64 inputs\)",
    ),
    ("integer bias", {"attn_bias": torch.ones(5, 7).int()}, r"attn_bias: got dtype torch.int32"),
    ("bias device", {"attn_bias": torch.ones(5, 7, device="meta")}, r"attn_bias: got device meta"),
    ("bias number", {"attn_bias": 1.0}, r"attn_bias: got float; expected a torch.Tensor"),
    (
        "float mask",
        {"attn_mask": torch.zeros(5, 7)},
        r"attn_mask: got dtype torch.float32; expected torch.bool.*Fix: pass an additive float mask as attn_bias",
    ),
    ("integer mask", {"attn_mask": torch.ones(5, 7).long()}, r"attn_mask: got dtype torch.int64"),
    (
        "mask shape",
        {"attn_mask": torch.ones(4, 2, 5, 7, dtype=torch.bool)},
        r"attn_mask: got shape \(4, 2, 5, 7\); expected a shape that broadcasts",
    ),
    (
        "mask device",
        {"attn_mask": torch.ones(5, 7, dtype=torch.bool, device="meta")},
        r"attn_mask: got device meta",
    ),
    (
        "key padding of queries",
        {"key_padding_mask": torch.ones(2, 5, dtype=torch.bool)},
        r"key_padding_mask: got shape \(2, 5\); expected \(2, 7\)",
    ),
    (
        "key padding rank",
        {"key_padding_mask": torch.ones(7, dtype=torch.bool)},
        r"key_padding_mask: got shape \(7,\)",
    ),
    (
        "integer key padding",
        {"key_padding_mask": torch.ones(2, 7).long()},
        r"key_padding_mask: got dtype torch.int64; expected torch.bool, where True is a real key",
    ),
    (
        "key padding device",
        {"key_padding_mask": torch.ones(2, 7, dtype=torch.bool, device="meta")},
        r"key_padding_mask: got device meta",
    ),
    (
        "sink shape",
        {"learnable_sink": torch.zeros(2, 4)},
        r"learnable_sink: got shape \(2, 4\); expected \(4,\). Fix: pass one logit per head",
    ),
    ("sink of key heads", {"learnable_sink": torch.zeros(2)}, r"learnable_sink: got shape \(2,\)"),
    ("sink dtype", {"learnable_sink": torch.zeros(4).long()}, r"learnable_sink: got dtype torch.int64"),
    ("sink device", {"learnable_sink": torch.zeros(4, device="meta")}, r"learnable_sink: got device meta"),
    (
        "alignment",
        {"causal_alignment": "top_left"},
        r"causal_alignment: got 'top_left'; expected 'bottom-right' or 'top-left'",
    ),
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
    ("pages of cu list", {"block_table": [[0]], "k": K, "v": K}, r"block_table: got list"),
    (
        "used shape",
        {"seqused_q": torch.zeros(3, dtype=torch.int32)},
        r"seqused_q: got shape \(3,\); expected an int32 tensor of shape \(2,\). Fix: pass one length per sequence",
    ),
    (
        "used dtype",
        {"seqused_k": torch.zeros(2, dtype=torch.int64)},
        r"seqused_k: got dtype torch.int64; expected torch.int32",
    ),
    (
        "used device",
        {"seqused_k": torch.zeros(2, dtype=torch.int32, device="meta")},
        r"seqused_k: got device meta",
    ),
    (
        "used too long",
        {"seqused_q": torch.tensor([5, 6], dtype=torch.int32)},
        r"seqused_q: got \[5, 6\]; expected lengths within those of cu_seqlens_q, \[4, 6\]",
    ),
    (
        "used negative",
        {"seqused_k": torch.tensor([-1, 6], dtype=torch.int32)},
        r"seqused_k: got \[-1, 6\]",
    ),
    (
        "bias batch",
        {"attn_bias": torch.zeros(3, 1, 9, 9)},
        r"attn_bias: got shape \(3, 1, 9, 9\); expected .*batch 2 or 1, heads 4 or 1, any seqlen_q, any seqlen_k",
    ),
    (
        "key padding of tokens",
        {"key_padding_mask": torch.ones(14, dtype=torch.bool)},
        r"key_padding_mask: got shape \(14,\); expected \(2, positions in a sequence\)",
    ),
    (
        "slopes of another batch",
        {"alibi_slopes": torch.zeros(3, 4)},
        r"alibi_slopes: got shape \(3, 4\); expected \(4,\) or \(2, 4\)",
    ),
    (
        "too few pages",
        {"k": K, "v": K, "block_table": torch.zeros(2, 1, dtype=torch.int32)},
        r"block_table: got 1 pages of 7 for the 8 keys of sequence 1; expected pages for every key",
    ),
    (
        "page that does not exist",
        {"k": K, "v": K, "block_table": torch.tensor([[0, 9], [1, 2]], dtype=torch.int32)},
        r"block_table: got \[1, 2\] for sequence 1; expected pages in \[0, 2\)",
    ),
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


QKV, KV = torch.zeros(2, 5, 3, 4, 8), torch.zeros(2, 7, 2, 2, 8)

OTHERS: list[tuple[str, Any, tuple[Any, ...], str]] = [
    (
        "three of qkv",
        flash_attn_qkvpacked_func,
        (QKV[:, :, :2],),
        r"qkv: got shape \(2, 5, 2, 4, 8\); expected shape \(batch, seqlen, 3, heads, head_dim\)",
    ),
    ("rank of qkv", flash_attn_qkvpacked_func, (QKV[0],), r"qkv: got shape \(5, 3, 4, 8\)"),
    ("qkv in a list", flash_attn_qkvpacked_func, ([Q, Q, Q],), r"qkv: got list; expected a torch.Tensor"),
    (
        "queries alone",
        partial(flash_attn_qkvpacked_func, num_heads_q=8),
        (QKV.flatten(2, 3)[:, :, :9],),
        "num_heads_q: got 8 of 9 heads; expected an even number of further heads, keys and values",
    ),
    (
        "no queries",
        partial(flash_attn_qkvpacked_func, num_heads_q=0),
        (QKV[0],),
        "num_heads_q: got 0; expected a pos",
    ),
    (
        "heads in two dimensions",
        partial(flash_attn_qkvpacked_func, num_heads_q=4),
        (QKV,),
        r"qkv: got shape .* expected shape \(batch, seqlen, num_heads_q \+ 2 \* num_heads_kv, head_dim\)",
    ),
    (
        "heads in a list",
        partial(flash_attn_varlen_qkvpacked_func, num_heads_q=4),
        ([Q], CU_Q),
        "qkv: got list",
    ),
    (
        "two of kv",
        flash_attn_kvpacked_func,
        (Q, QKV),
        r"kv: got shape \(2, 5, 3, 4, 8\); expected shape \(batch, seqlen, 2, heads, head_dim\)",
    ),
    ("batch of kv", flash_attn_kvpacked_func, (Q[:1], KV), r"k: got batch 2; expected the batch of q, 1"),
    (
        "packed three of qkv",
        flash_attn_varlen_qkvpacked_func,
        (QKV, CU_Q),
        r"qkv: got shape .* expected shape \(total_tokens, 3, heads, head_dim\)",
    ),
    (
        "cu of qkv",
        flash_attn_varlen_qkvpacked_func,
        (QKV[0], CU_Q.long(), 6),
        r"cu_seqlens_q: got dtype torch.int64",
    ),
    (
        "packed two of kv",
        flash_attn_varlen_kvpacked_func,
        (PACKED_Q, KV, CU_Q, CU_K),
        r"kv: got shape .* expected shape \(total_tokens, 2, heads, head_dim\)",
    ),
    ("parts to merge", merge_attention_states, ([Q], []), r"lses: got 0 tensors for 1 outs"),
    ("nothing to merge", merge_attention_states, ([], []), r"lses: got 0 tensors for 0 outs"),
    (
        "shape to merge",
        merge_attention_states,
        ([Q, K], [Q[..., 0]] * 2),
        r"lses\[0\]: got shape \(2, 5, 4\)",
    ),
    (
        "shapes to merge",
        merge_attention_states,
        ([Q, K], [torch.zeros(2, 4, 5)] * 2),
        r"outs\[1\]: got shape .* expected that of outs\[0\]",
    ),
    ("rank to merge", merge_attention_states, ([Q[0, 0]], [Q[0, 0]]), r"outs\[0\]: got shape \(4, 8\)"),
    (
        "numbers to merge",
        merge_attention_states,
        ([Q], [[0.0]]),
        r"lses\[0\]: got list; expected a torch.Tensor",
    ),
    (
        "no parts to merge",
        merge_attention_states,
        (None, None),
        r"outs: got NoneType; expected tensors in a list",
    ),
    (
        "one number to merge",
        merge_attention_states,
        (torch.tensor(1.0), torch.tensor(1.0)),
        r"outs: got a single number; expected tensors in a list",
    ),
    (
        "integers to merge",
        merge_attention_states,
        ([Q.long()], [torch.zeros(2, 4, 5)]),
        r"outs\[0\]: got dtype torch.int64; expected a floating-point dtype",
    ),
    (
        "devices to merge",
        merge_attention_states,
        ([Q, Q], [torch.zeros(2, 4, 5), torch.zeros(2, 4, 5, device="meta")]),
        r"lses\[1\]: got device meta; expected that of outs\[0\], cpu",
    ),
    (
        "list to unpad",
        unpad_input,
        ([1.0], torch.ones(2, 5)),
        r"hidden_states: got list; expected a torch.Tensor",
    ),
    (
        "list to unpad by",
        unpad_input,
        (Q, [[1] * 5] * 2),
        r"attention_mask: got list; expected a torch.Tensor",
    ),
    (
        "device to unpad by",
        unpad_input,
        (Q, torch.ones(2, 5, device="meta")),
        r"attention_mask: got device meta; expected the device of hidden_states, cpu",
    ),
    (
        "more tokens than a row has",
        unpad_input_for_concatenated_sequences,
        (Q, torch.tensor([[3, 4, 0, 0, 0], [5, 0, 0, 0, 0]])),
        r"attention_mask_in_length: got sequences of 12 tokens for the 10 that there are; .* at most 5 in each row",
    ),
    (
        "negative lengths",
        unpad_input_for_concatenated_sequences,
        (Q, torch.tensor([[3, -1, 0, 0, 0], [5, 0, 0, 0, 0]])),
        r"attention_mask_in_length: got sequences of 8 tokens for the 7 that there are; expected lengths >= 0",
    ),
    (
        "mask to unpad by",
        unpad_input,
        (Q, torch.ones(2, 4)),
        r"attention_mask: got shape \(2, 4\); expected .*\(2, 5\)",
    ),
    ("unused mask", unpad_input, (Q, torch.ones(2, 5), torch.ones(2)), r"unused_mask: got shape \(2,\)"),
    ("nothing padded", unpad_input, (Q[0, 0, 0], torch.ones(8)), r"hidden_states: got shape \(8,\)"),
    (
        "lengths to unpad by",
        unpad_input_for_concatenated_sequences,
        (Q, torch.ones(2)),
        r"attention_mask_in_length: got shape \(2,\)",
    ),
]


@pytest.mark.parametrize(
    "function, arguments, message", [pytest.param(*case[1:], id=case[0]) for case in OTHERS]
)
def test_other_functions(function, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        function(*arguments)
    assert "Fix: " in str(error.value)


def test_an_error_comes_before_anything_else() -> None:
    """Bad arguments reach no kernel and draw no random numbers."""
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    with pytest.raises(ValueError):
        flash_attn_func(Q, K, K, dropout_p=0.5, softmax_scale=float("nan"))
    assert torch.rand(1) == expected
