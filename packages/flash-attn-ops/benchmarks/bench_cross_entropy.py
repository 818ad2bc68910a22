"""Cross-entropy of 8192 rows against eager torch and torch.compile.

Bytes that must move: forward reads the logits; backward reads them and writes their gradient. "training step" is both,
with the gradient in place of the logits where a contestant can.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from flash_attn_kernels.testing import interleaved_times, measure_ceilings, write_result
from flash_attn_ops.cross_entropy import cross_entropy
from memory_bound import Case, in_turn, measure
from torch import Tensor

ROWS = 8192


def torch_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels)  # in bfloat16 the loss would be rounded to three digits


def make_case(classes: int) -> Case:
    labels = torch.randint(0, classes, (ROWS,), device="cuda")

    def inputs() -> list[Tensor]:
        return [torch.randn(ROWS, classes, device="cuda", dtype=torch.bfloat16).requires_grad_()]

    theirs = partial(torch_loss, labels=labels)
    logits_bytes = 2 * ROWS * classes
    return Case(
        {"dtype": "bfloat16", "rows": ROWS, "classes": classes},
        inputs,
        {
            "ours": partial(cross_entropy, labels=labels),
            "torch": theirs,
            "torch.compile": torch.compile(theirs, dynamic=False),
        },
        forward_bytes=logits_bytes,
        backward_bytes=2 * logits_bytes,
    )


def measure_step(case: Case, copy_gbps: float, samples: int) -> list[dict[str, Any]]:
    """Forward and backward in one call, on fresh graphs. Ours overwrites logits, which are random bits again after
    it."""
    sets = [case.make_inputs()[0] for _ in range(2)]
    contestants = {**case.contestants, "ours": partial(case.contestants["ours"], inplace_backward=True)}

    def step(loss_of: Callable[[Tensor], Tensor], index: int) -> Tensor:
        return torch.autograd.grad(loss_of(sets[index]), sets[index])[0]

    calls = {name: in_turn(partial(step, call)) for name, call in contestants.items() if name != "ours"}
    calls["ours"] = in_turn(partial(step, contestants["ours"]))  # last, so that the others see logits first
    moved = case.forward_bytes + case.backward_bytes
    rows = []
    for name, time in interleaved_times(calls, samples=samples).items():
        gbps = moved / time.median_us * 1e-3
        rows.append(
            {
                **case.description,
                "direction": "training step",
                "contestant": name,
                "median_us": round(time.median_us, 1),
                "p20_us": round(time.p20_us, 1),
                "p80_us": round(time.p80_us, 1),
                "bytes_moved": moved,
                "gbps": round(gbps, 1),
                "share_of_copy": round(gbps / copy_gbps, 3),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default="cross_entropy.json", help="result file (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one size, fewer samples")
    arguments = parser.parse_args()
    samples = 8 if arguments.quick else 20
    ceilings = measure_ceilings()
    print(f"ceilings: {ceilings}", flush=True)
    rows: list[dict[str, Any]] = []
    for classes in [50257] if arguments.quick else [32768, 50257, 131072]:
        case = make_case(classes)
        measured = measure(case, ceilings["copy_gbps"], samples)
        measured += measure_step(case, ceilings["copy_gbps"], samples)
        rows += measured
        for row in measured:
            print("  ".join(str(value) for name, value in row.items() if name != "bytes_moved"), flush=True)
        torch.cuda.empty_cache()
        write_result(arguments.json, "cross_entropy", rows, ceilings)


if __name__ == "__main__":
    main()
