"""Attention with a dense bias against SDPA's memory-efficient backend, and the cost of every other score modifier.

8k tokens and a hidden size of 2048 in bf16, not causal. "efficient" gets the same bias, or for ALiBi and padding one
that says the same; "flash2" takes part in dropout. "ours-plain" is our own call without the modifier.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from contestants import OURS, Contestant, run, sdpa, time_directions, timed_rows
from flash_attn_kernels import explain, flash_attn_func
from torch import Tensor
from torch.nn.attention import SDPBackend

TOKENS, HIDDEN = 8192, 2048
HEAD_DIMS = (64, 128)
MODIFIERS = ("softcap", "alibi", "dropout", "key-padding", "mask-11SS", "sink")
PLAIN = "ours-plain"
Rows = list[dict[str, Any]]
Directions = Sequence[str]


def our_attention(**options: Any) -> Callable[..., Tensor]:
    return lambda q, k, v, *bias: flash_attn_func(
        q, k, v, **({"attn_bias": bias[0]} if bias else {}), **options, strict=True
    )


def random_qkv(seqlen: int, head_dim: int) -> tuple[list[Tensor], Tensor]:
    shape = (4, TOKENS // seqlen, seqlen, HIDDEN // head_dim, head_dim)
    *qkv, dout = torch.randn(shape, device="cuda", dtype=torch.bfloat16).unbind()
    return [x.detach().requires_grad_() for x in qkv], dout


def rows_of(
    option: str,
    seqlen: int,
    contestants: dict[str, Contestant],
    directions: Directions,
    samples: int,
) -> Rows:
    head_dim = contestants[OURS].leaves[0].shape[-1]
    rows = []
    for direction, times in time_directions(contestants, directions, samples=samples).items():
        case = {"option": option, "direction": direction, "head_dim": head_dim, "seqlen": seqlen}
        rows += timed_rows(times, contestants, case)
    return rows


def plain(qkv: list[Tensor], dout: Tensor, forward: bool = True) -> Contestant:
    """Our own call without the modifier, which may take a faster path."""
    return Contestant(our_attention(), qkv, [dout], explain(*qkv).path, forward, comparable=None)


def bench_bias(
    shape_name: str, with_gradient: bool, seqlen: int, head_dim: int, directions: Directions, samples: int
) -> Rows:
    """A bias of shape (B, H, S, S) or (1, H, S, S). Its gradient concerns the backward alone."""
    qkv, dout = random_qkv(seqlen, head_dim)
    batch, _, heads, _ = qkv[0].shape
    shape = (batch if shape_name == "BHSS" else 1, heads, seqlen, seqlen)
    bias = torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_(with_gradient)
    path, forward = explain(*qkv, attn_bias=bias).path, not with_gradient
    efficient = sdpa(SDPBackend.EFFICIENT_ATTENTION)
    contestants = {
        OURS: Contestant(our_attention(), [*qkv, bias], [dout], path, forward),
        "efficient": Contestant(efficient, [*qkv, bias], [dout], forward=forward),
        PLAIN: plain(qkv, dout, forward),
    }
    option = f"bias-{shape_name}" + "-gradient" * with_gradient
    return rows_of(option, seqlen, contestants, directions, samples)


def alibi_slopes(heads: int) -> Tensor:
    return torch.exp2(-8.0 * torch.arange(1, heads + 1, device="cuda") / heads)


def alibi_bias(heads: int, seqlen: int) -> Tensor:
    """(1, H, S, S), what ALiBi adds to the scores."""
    positions = torch.arange(seqlen, device="cuda")
    distance = (positions - positions.unsqueeze(-1)).abs()
    return (-alibi_slopes(heads).reshape(1, heads, 1, 1) * distance).to(torch.bfloat16)


def padding(batch: int, seqlen: int) -> Tensor:
    """bool (B, S): real keys first, between half and all of them."""
    lengths = torch.linspace(seqlen // 2, seqlen, batch, device="cuda").round()
    return torch.arange(seqlen, device="cuda") < lengths.unsqueeze(-1)


def bench_modifier(option: str, seqlen: int, head_dim: int, directions: Directions, samples: int) -> Rows:
    qkv, dout = random_qkv(seqlen, head_dim)
    batch, _, heads, _ = qkv[0].shape
    arguments: dict[str, Any] = {}
    peers: dict[str, Contestant] = {}
    efficient = sdpa(SDPBackend.EFFICIENT_ATTENTION)
    if option == "softcap":
        arguments["softcap"] = 20.0
    elif option == "sink":
        arguments["learnable_sink"] = torch.zeros(heads, device="cuda")
    elif option == "dropout":
        arguments["dropout_p"] = 0.1
        flash2 = sdpa(SDPBackend.FLASH_ATTENTION, dropout_p=0.1)
        peers["flash2"] = Contestant(flash2, qkv, [dout], comparable=None)  # it drops other elements
    elif option == "alibi":
        arguments["alibi_slopes"] = alibi_slopes(heads)
        peers["efficient"] = Contestant(efficient, [*qkv, alibi_bias(heads, seqlen)], [dout])
    elif option == "key-padding":
        arguments["key_padding_mask"] = padding(batch, seqlen)
        mask = arguments["key_padding_mask"][:, None, None, :].expand(batch, heads, seqlen, seqlen)
        peers["efficient"] = Contestant(efficient, [*qkv, mask], [dout])
    elif option == "mask-11SS":
        mask = torch.rand(1, 1, seqlen, seqlen, device="cuda") < 0.9
        arguments["attn_mask"] = mask
        mask = mask.expand(batch, heads, seqlen, seqlen)
        peers["efficient"] = Contestant(efficient, [*qkv, mask], [dout])
    path = explain(*qkv, **arguments).path
    contestants = {
        OURS: Contestant(our_attention(**arguments), qkv, [dout], path),
        **peers,
        PLAIN: plain(qkv, dout),
    }
    return rows_of(option, seqlen, contestants, directions, samples)


def cases(arguments: argparse.Namespace) -> Iterator[Rows]:
    seqlens, samples = ((1024,), 5) if arguments.quick else ((1024, 2048, 4096), 10)
    biases = itertools.product(("BHSS", "1HSS"), (False, True), seqlens, HEAD_DIMS)
    for shape_name, with_gradient, seqlen, head_dim in biases:
        if with_gradient and "backward" not in arguments.directions:
            continue
        yield bench_bias(shape_name, with_gradient, seqlen, head_dim, arguments.directions, samples)
        torch.cuda.empty_cache()  # a bias and its gradient hold gigabytes
    for option, head_dim in itertools.product(MODIFIERS, HEAD_DIMS):
        yield bench_modifier(option, seqlens[-1], head_dim, arguments.directions, samples)


if __name__ == "__main__":
    run("attention_bias", __doc__.splitlines()[0], cases, by_direction=True)
