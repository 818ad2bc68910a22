"""Attention forward and backward against SDPA's flash (FlashAttention-2) and cuDNN backends, in one interleaved run.

Every row holds 16k tokens and a hidden size of 2048 in bf16, as published sweeps do. FLOPs are counted the usual way:
4 * B * H * Sq * Sk * D forward, half of it under a causal mask, and 2.5 times that backward.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from flash_attn_kernels import explain, flash_attn_func
from flash_attn_kernels.testing import interleaved_times, measure_ceilings, write_result
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

TOKENS, HIDDEN = 16384, 2048
PEERS = {"flash2": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def sdpa(backend: SDPBackend, causal: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """SDPA on one backend, taking and returning (B, S, H, D)."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal)
        return out.transpose(1, 2)

    return attend


def contestants(causal: bool, deterministic: bool) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    ours = {"ours": lambda q, k, v: flash_attn_func(q, k, v, causal=causal, strict=True)}
    if deterministic:
        ours["ours deterministic"] = lambda q, k, v: flash_attn_func(
            q, k, v, causal=causal, deterministic=True, strict=True
        )
    return {**ours, **{name: sdpa(backend, causal) for name, backend in PEERS.items()}}


def check_agreement(outputs: dict[str, Tensor]) -> None:
    """All contestants compute the same thing, to bf16 rounding, before any is timed."""
    expected = outputs["ours"].float()
    for name, out in outputs.items():
        error = (out.float() - expected).norm() / expected.norm()
        if not error < 1e-2:
            raise RuntimeError(f"{name} differs from ours by a relative {error:.2e}")


def bench_case(seqlen: int, head_dim: int, causal: bool, samples: int) -> list[dict[str, Any]]:
    batch, heads = TOKENS // seqlen, HIDDEN // head_dim
    q, k, v, dout = torch.randn(4, batch, seqlen, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    path = explain(q, k, v, causal=causal).path
    functions = contestants(causal, deterministic=True)
    outputs = {name: attend(*leaves) for name, attend in functions.items()}
    check_agreement(outputs)
    check_agreement(
        {name: torch.autograd.grad(out, leaves, dout, retain_graph=True)[0] for name, out in outputs.items()}
    )
    forward = {
        name: (lambda attend=attend: attend(q, k, v))
        for name, attend in functions.items()
        if name != "ours deterministic"
    }
    backward = {
        name: (lambda out=out: torch.autograd.grad(out, leaves, dout, retain_graph=True))
        for name, out in outputs.items()
    }
    flops = 4 * batch * heads * seqlen**2 * head_dim / (2 if causal else 1)
    rows = []
    for direction, calls, factor in (("forward", forward, 1.0), ("backward", backward, 2.5)):
        for name, time in interleaved_times(calls, samples=samples).items():
            rows.append(
                {
                    "direction": direction,
                    "head_dim": head_dim,
                    "causal": causal,
                    "seqlen": seqlen,
                    "contestant": name,
                    "path": path if name.startswith("ours") else None,
                    "tflops": round(flops * factor / time.median_us * 1e-6, 1),
                    "median_us": round(time.median_us, 2),
                    "p20_us": round(time.p20_us, 2),
                    "p80_us": round(time.p80_us, 2),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default="attention.json", help="result file (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="fewer samples, one sequence length")
    arguments = parser.parse_args()
    ceilings = measure_ceilings()
    print(f"ceilings: {ceilings}", flush=True)
    seqlens, samples = ([4096], 5) if arguments.quick else ([1024, 4096, 16384], 20)
    rows: list[dict[str, Any]] = []
    for head_dim, causal, seqlen in itertools.product([64, 128], [False, True], seqlens):
        for row in bench_case(seqlen, head_dim, causal, samples):
            share = row["tflops"] / ceilings["gemm_tflops"]
            rows.append({**row, "share_of_gemm": round(share, 3)})
            case = f"{row['direction']:8} d{head_dim:<3} {'causal' if causal else 'full':6} {seqlen:6}"
            print(f"{case} {row['contestant']:18} {row['tflops']:7.1f} TFLOP/s", flush=True)
    write_result(arguments.json, "attention", rows, ceilings)


if __name__ == "__main__":
    main()
