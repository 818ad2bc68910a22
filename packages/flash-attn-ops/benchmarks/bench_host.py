"""Host time of one call, forward and backward, on small tensors: ours against eager torch, and against the floor.

The device is done long before the host has issued the next call. A sample is many calls without a wait; the device is
waited for between samples only. Where torch has no such operation its column is the composition that users write.

``floor`` is what any operation costs that is written in Python: a ``torch.autograd.Function`` of the same tensors, in
which forward and backward allocate their results and do nothing else.
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from flash_attn_kernels.testing import measure_ceilings, write_result
from flash_attn_ops.activations import swiglu
from flash_attn_ops.cross_entropy import cross_entropy
from flash_attn_ops.norm import layer_norm, rms_norm
from flash_attn_ops.rotary import apply_rotary_emb, apply_rotary_emb_qk
from torch import Tensor

ROWS, HIDDEN_SIZE, CLASSES = 64, 1024, 1024
SEQLEN, HEADS, HEAD_DIM = 64, 4, 64
CALLS_A_SAMPLE, SAMPLES, WARMUP_CALLS = 300, 15, 100
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Call = Callable[[], Any]


class Floor(torch.autograd.Function):
    """As many results as ``results`` says, each like an input; and their gradients."""

    @staticmethod
    def forward(ctx: Any, results: int, *leaves: Tensor) -> Tensor | tuple[Tensor, ...]:
        ctx.save_for_backward(*leaves)
        outputs = tuple(torch.empty_like(leaf) for leaf in leaves[:results])
        return outputs if results > 1 else outputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *(torch.empty_like(leaf) for leaf in ctx.saved_tensors))


def leaf(*shape: int) -> Tensor:
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    return torch.randn(shape, device=DEVICE, dtype=dtype).requires_grad_()


def norm_calls() -> dict[str, tuple[Sequence[Tensor], Call, Call]]:
    x, residual, weight, bias = (
        leaf(ROWS, HIDDEN_SIZE),
        leaf(ROWS, HIDDEN_SIZE),
        leaf(HIDDEN_SIZE),
        leaf(HIDDEN_SIZE),
    )
    size = (HIDDEN_SIZE,)
    return {
        "rms_norm": (
            (x, weight),
            lambda: rms_norm(x, weight),
            lambda: F.rms_norm(x, size, weight, 1e-5),
        ),
        "layer_norm": (
            (x, weight, bias),
            lambda: layer_norm(x, weight, bias),
            lambda: F.layer_norm(x, size, weight, bias, 1e-5),
        ),
        "add + rms_norm": (
            (x, residual, weight),
            lambda: rms_norm(x, weight, residual=residual),
            lambda: F.rms_norm(x + residual, size, weight, 1e-5),
        ),
    }


def rotary_calls() -> dict[str, tuple[Sequence[Tensor], Call, Call]]:
    q, k = leaf(1, SEQLEN, HEADS, HEAD_DIM), leaf(1, SEQLEN, HEADS, HEAD_DIM)
    angles = torch.rand(SEQLEN, HEAD_DIM // 2, device=DEVICE)
    cos, sin = angles.cos(), angles.sin()
    wide_cos, wide_sin = (torch.cat([table, table], -1)[:, None].to(q.dtype) for table in (cos, sin))

    def theirs(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * wide_cos + torch.cat([-second, first], -1) * wide_sin

    return {
        "rotary": ((q,), lambda: apply_rotary_emb(q, cos, sin), lambda: theirs(q)),
        "rotary of q and k": (
            (q, k),
            lambda: apply_rotary_emb_qk(q, k, cos, sin),
            lambda: (theirs(q), theirs(k)),
        ),
    }


def activation_calls() -> dict[str, tuple[Sequence[Tensor], Call, Call]]:
    gate, value = leaf(ROWS, HIDDEN_SIZE), leaf(ROWS, HIDDEN_SIZE)
    return {"swiglu": ((gate, value), lambda: swiglu(gate, value), lambda: F.silu(gate) * value)}


def cross_entropy_calls() -> dict[str, tuple[Sequence[Tensor], Call, Call]]:
    logits = leaf(ROWS, CLASSES)
    labels = torch.randint(0, CLASSES, (ROWS,), device=DEVICE)
    ours: Callable[[], Any] = lambda: cross_entropy(logits, labels)  # noqa: E731
    return {"cross_entropy": ((logits,), ours, lambda: F.cross_entropy(logits, labels))}


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def host_times(calls: dict[str, Callable[[], object]], samples: int) -> dict[str, list[float]]:
    """Microseconds a call, sample by sample, the contestants in turn."""
    for call in calls.values():
        for _ in range(WARMUP_CALLS):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(samples):
        for name, call in calls.items():
            wait()
            start = time.perf_counter()
            for _ in range(CALLS_A_SAMPLE):
                call()
            times[name].append((time.perf_counter() - start) / CALLS_A_SAMPLE * 1e6)
    wait()
    return times


def training(leaves: Sequence[Tensor], call: Call) -> Callable[[], object]:
    """Forward and backward to new gradients."""
    outputs = call()
    upstream = (
        tuple(map(torch.ones_like, outputs)) if isinstance(outputs, tuple) else torch.ones_like(outputs)
    )
    return lambda: torch.autograd.grad(call(), leaves, upstream)


def inference(call: Call) -> Callable[[], object]:
    def without_gradients() -> object:
        with torch.no_grad():
            return call()

    return without_gradients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default="host.json", help="result file (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="fewer samples")
    arguments = parser.parse_args()
    ceilings = measure_ceilings() if DEVICE == "cuda" else {}
    rows: list[dict[str, Any]] = []
    gc.disable()
    for operation, (leaves, ours, theirs) in {
        **norm_calls(),
        **rotary_calls(),
        **cross_entropy_calls(),
        **activation_calls(),
    }.items():
        results = len(leaves) if isinstance(ours(), tuple) else 1
        floor = functools.partial(Floor.apply, results, *leaves)
        contestants: dict[str, Call] = {"ours": ours, "torch": theirs, "floor": floor}
        for direction, calls in (
            ("forward", {name: inference(call) for name, call in contestants.items()}),
            (
                "forward + backward",
                {name: training(leaves, call) for name, call in contestants.items()},
            ),
        ):
            for contestant, times in host_times(calls, 3 if arguments.quick else SAMPLES).items():
                low, _, _, high = statistics.quantiles(times, n=5)
                rows.append(
                    {
                        "operation": operation,
                        "direction": direction,
                        "contestant": contestant,
                        "median_us": round(statistics.median(times), 1),
                        "p20_us": round(low, 1),
                        "p80_us": round(high, 1),
                    }
                )
                print("  ".join(map(str, rows[-1].values())), flush=True)
        if DEVICE == "cuda":
            write_result(arguments.json, "host", rows, ceilings)
    if DEVICE != "cuda":
        print("no CUDA device: these are times of the reference path, and are not written")


if __name__ == "__main__":
    main()
