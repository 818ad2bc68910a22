"""What the benchmarks of memory-bound operations share: contestants of one case, their check, their rows."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config
from flash_attn_kernels.testing import interleaved_times, measure_ceilings, write_result
from torch import Tensor

torch._functorch.config.donated_buffer = False  # compiled backwards are timed again and again on one graph

ELEMENTS = 2**27  # of one activation: 256 MiB in bf16, four times the L2 cache of an H200
BUFFER_SETS = 2  # taken in turn, so that no call finds the end of the one before in the cache


@dataclass
class Case:
    """One operation at one size: how to make inputs, who competes, what must move.

    ``make_inputs`` gives the tensors that contestants take; those that require grad get gradients. ``contestants``
    map them to one output or several, the same for all.
    """

    description: dict[str, Any]
    make_inputs: Callable[[], list[Tensor]]
    contestants: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]]
    forward_bytes: int
    backward_bytes: int
    draws_at_random: bool = False  # each contestant drops its own elements: only sizes are compared


def measure(case: Case, copy_gbps: float, samples: int) -> list[dict[str, Any]]:
    """Rows of all contestants, forward and backward, checked against each other first."""
    sets = [case.make_inputs() for _ in range(BUFFER_SETS)]
    graphs = {name: [outputs_of(call, inputs) for inputs in sets] for name, call in case.contestants.items()}
    upstream = [torch.randn_like(out) for out in next(iter(graphs.values()))[0]]
    leaves = [[tensor for tensor in inputs if tensor.requires_grad] for inputs in sets]

    def gradients(name: str, index: int) -> tuple[Tensor, ...]:
        return torch.autograd.grad(graphs[name][index], leaves[index], upstream, retain_graph=True)

    check_agreement({name: outputs[0] for name, outputs in graphs.items()}, case)
    check_agreement({name: gradients(name, 0) for name in graphs}, case)

    detached = [[tensor.detach() for tensor in inputs] for inputs in sets]
    forward = {
        name: in_turn(lambda i, call=call: call(*detached[i])) for name, call in case.contestants.items()
    }
    backward = {name: in_turn(lambda i, name=name: gradients(name, i)) for name in graphs}
    rows = []
    for direction, calls, moved in (
        ("forward", forward, case.forward_bytes),
        ("backward", backward, case.backward_bytes),
    ):
        for name, time in interleaved_times(calls, samples=samples).items():
            gbps = moved / time.median_us * 1e-3
            rows.append(
                {
                    **case.description,
                    "direction": direction,
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


def outputs_of(call: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    outputs = call(*inputs)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def in_turn(call: Callable[[int], object]) -> Callable[[], object]:
    turns = itertools.cycle(range(BUFFER_SETS))
    return lambda: call(next(turns))


def check_agreement(results: dict[str, tuple[Tensor, ...]], case: Case) -> None:
    """Every contestant computes what the first one does, to rounding.

    That is 1e-2 in bf16, and 3e-2 for vectors, which are sums over all rows that some contestants round on the way.
    Of random results only the sizes are compared, to 5e-2.
    """
    expected = next(iter(results.values()))
    for name, tensors in results.items():
        for index, (actual, exact) in enumerate(zip(tensors, expected, strict=True)):
            size = exact.float().norm()
            if case.draws_at_random:
                error, limit = (actual.float().norm() / size - 1).abs().item(), 5e-2
            else:
                error = ((actual.float() - exact.float()).norm() / size).item()
                limit = 3e-2 if exact.dim() == 1 else 1e-2
            if not error < limit:
                raise RuntimeError(
                    f"{case.description}: {name}, tensor {index}: relative difference {error:.2e}"
                )


def run(benchmark: str, summary: str, cases: Callable[[bool], list[Callable[[], Case]]]) -> None:
    """The command line of a benchmark; ``cases(quick)`` are made one at a time, for the sake of memory, and after each
    of them the result is written, so that a run that is cut off keeps what it had."""
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--json", default=f"{benchmark}.json", help="result file (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one size, fewer samples")
    arguments = parser.parse_args()
    ceilings = measure_ceilings()
    print(f"ceilings: {ceilings}", flush=True)
    rows: list[dict[str, Any]] = []
    for make_case in cases(arguments.quick):
        measured = measure(make_case(), ceilings["copy_gbps"], samples=8 if arguments.quick else 20)
        rows += measured
        for row in measured:
            print("  ".join(str(value) for name, value in row.items() if name != "bytes_moved"), flush=True)
        torch.cuda.empty_cache()
        write_result(arguments.json, benchmark, rows, ceilings)
