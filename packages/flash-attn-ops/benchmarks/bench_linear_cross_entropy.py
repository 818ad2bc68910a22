"""A head and its loss, forward and backward, against its bare matrix products, eager torch and torch.compile.

The bare products are those of all rows at once: logits, and from a random gradient of them the gradients of hidden and
weight, all in bfloat16 by cuBLAS. With 50257 classes they are those of 50304, the next multiple of 64: of sizes that
are not multiples of 8 they take five times as long, which would be no floor. ``share_of_gemms`` is their time over a
contestant's; the peak is what a step needs beyond its inputs, gradients included.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from flash_attn_kernels.testing import interleaved_times, measure_ceilings, write_result
from flash_attn_ops.linear_cross_entropy import linear_cross_entropy
from torch import Tensor

SIZES = [  # tokens, hidden size, classes
    (8192, 4096, 32000),
    (8192, 4096, 128256),
    (16384, 2048, 50257),
    (8192, 4096, 50304),
]


def torch_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def step(
    loss_of: Callable[..., Tensor], hidden: Tensor, weight: Tensor, labels: Tensor
) -> tuple[Tensor, ...]:
    loss = loss_of(hidden, weight, labels)
    return loss, *torch.autograd.grad(loss, (hidden, weight))


def measure(tokens: int, size: int, classes: int, samples: int) -> list[dict[str, Any]]:
    hidden = torch.randn(tokens, size, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(classes, size, device="cuda", dtype=torch.bfloat16) / size**0.5).requires_grad_()
    labels = torch.randint(0, classes, (tokens,), device="cuda")
    padded_weight = F.pad(weight.detach(), (0, 0, 0, -classes % 8 and -classes % 64))
    logits = hidden.new_empty(tokens, len(padded_weight))
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(padded_weight)

    @torch.no_grad()
    def products() -> None:
        torch.mm(hidden, padded_weight.t(), out=logits)
        torch.mm(logits, padded_weight, out=d_hidden)
        torch.mm(logits.t(), hidden, out=d_weight)

    losses: dict[str, Callable[..., Tensor]] = {
        "ours": linear_cross_entropy,
        "torch": torch_loss,
        "torch.compile": torch.compile(torch_loss, dynamic=False),
    }
    steps = {name: partial(step, loss_of, hidden, weight, labels) for name, loss_of in losses.items()}
    check_agreement(steps)
    peaks = {name: peak_gib(call) for name, call in steps.items()}
    times = interleaved_times({"bare products": products, **steps}, samples=samples)
    flops, bare = 6 * tokens * size * classes, times["bare products"].median_us
    return [
        {
            "dtype": "bfloat16",
            "tokens": tokens,
            "hidden_size": size,
            "classes": classes,
            "contestant": name,
            "median_us": round(time.median_us, 1),
            "p20_us": round(time.p20_us, 1),
            "p80_us": round(time.p80_us, 1),
            "tflops": round(flops / time.median_us * 1e-6, 1),
            "share_of_gemms": round(bare / time.median_us, 3),
            "peak_gib": round(peaks[name], 2) if name in peaks else None,
        }
        for name, time in times.items()
    ]


def check_agreement(steps: dict[str, Callable[[], tuple[Tensor, ...]]]) -> None:
    """Loss and gradients to 1%, as bfloat16 rounds them."""
    expected = steps["torch"]()
    for name, call in steps.items():
        for index, (actual, exact) in enumerate(zip(call(), expected, strict=True)):
            error = ((actual.float() - exact.float()).norm() / exact.float().norm()).item()
            if not error < 1e-2:
                raise RuntimeError(f"{name}, result {index}: relative difference {error:.2e}")


def peak_gib(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--json", default="linear_cross_entropy.json", help="result file (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="one size, fewer samples")
    arguments = parser.parse_args()
    ceilings = measure_ceilings()
    print(f"ceilings: {ceilings}", flush=True)
    rows: list[dict[str, Any]] = []
    for size in SIZES[: 1 if arguments.quick else None]:
        measured = measure(*size, samples=5 if arguments.quick else 10)
        rows += measured
        for row in measured:
            print("  ".join(str(value) for value in row.values()), flush=True)
        torch.cuda.empty_cache()
        write_result(arguments.json, "linear_cross_entropy", rows, ceilings)


if __name__ == "__main__":
    main()
