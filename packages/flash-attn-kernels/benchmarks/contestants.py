"""What the attention benchmarks share: torch's own attention as the peer, checked agreement, timed rows."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from flash_attn_kernels.testing import Timing, interleaved_times, measure_ceilings, write_result
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attend = Callable[..., Tensor]  # takes the leaves of a case, gives the output
OURS = "ours"
# Column of a result -> the column that holds its share of a ceiling of the run, and the ceiling.
SHARES = {"tflops": ("share_of_gemm", "gemm_tflops"), "gbps": ("share_of_copy", "copy_gbps")}


def sdpa(backend: SDPBackend, **options: Any) -> Attend:
    """SDPA on one backend, taking and returning (B, S, H, D); a fourth tensor is its mask or bias."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1], **options
            )
        return out.transpose(1, 2)

    return attend


def flash2_varlen(cu_seqlens: Tensor, max_seqlen: int, causal: bool) -> Attend:
    """The packed call of the FlashAttention-2 kernels inside torch, taking and returning (T, H, D)."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, causal, False
        )
        return out

    return attend


def attention_flops(batch: int, heads: int, seqlen: int, head_dim: int, causal: bool) -> float:
    """Of a forward, counted the usual way: two products, half of them under a causal mask."""
    return 4.0 * batch * heads * seqlen**2 * head_dim / (2 if causal else 1)


DIRECTIONS = {"forward": 1.0, "backward": 2.5}  # and their operations: a backward has five products, not two


@dataclass(frozen=True)
class Contestant:
    """One implementation of a case, with the tensors that it takes.

    ``attend`` maps the leaves to one output or several; gradients are taken for the leaves that require one, with
    ``upstream`` as the gradients of the outputs. ``path`` is which of our paths runs, None for a peer. ``comparable``
    brings outputs, and gradients, into the order of ours; None where results differ because they should, as with
    dropout.
    """

    attend: Callable[..., Tensor | tuple[Tensor, ...]]
    leaves: Sequence[Tensor]
    upstream: Sequence[Tensor]
    path: str | None = None
    forward: bool = True
    backward: bool = True
    comparable: Callable[[Sequence[Tensor]], Sequence[Tensor]] | None = tuple

    def forward_call(self) -> Callable[[], Sequence[Tensor]]:
        detached = [x.detach() for x in self.leaves]
        return lambda: as_tuple(self.attend(*detached))

    def backward_call(self) -> Callable[[], Sequence[Tensor]]:
        outputs = as_tuple(self.attend(*self.leaves))
        wanted = [x for x in self.leaves if x.requires_grad]
        return lambda: torch.autograd.grad(outputs, wanted, self.upstream, retain_graph=True)


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def time_directions(
    contestants: Mapping[str, Contestant], directions: Sequence[str], *, samples: int
) -> dict[str, dict[str, Timing | None]]:
    """Direction -> contestant -> time, after all have agreed; None where a contestant has no kernel for the case."""
    forward = {name: c.forward_call for name, c in contestants.items() if c.forward}
    backward = {name: c.backward_call for name, c in contestants.items() if c.backward}
    makers = {"forward": forward, "backward": backward}
    times: dict[str, dict[str, Timing | None]] = {}
    for direction in directions:
        calls = checked_calls(direction, makers[direction], contestants)
        measured = interleaved_times(calls, samples=samples, warmup=2, min_sample_us=200.0) if calls else {}
        times[direction] = {name: measured.get(name) for name in makers[direction]}
    return times


def checked_calls(
    direction: str,
    make_calls: Mapping[str, Callable[[], Callable[[], Sequence[Tensor]]]],
    contestants: Mapping[str, Contestant],
) -> dict[str, Callable[[], Sequence[Tensor]]]:
    """The calls of those that have a kernel for the case, after their results have agreed."""
    calls, results = {}, {}
    for name, make_call in make_calls.items():
        required = contestants[name].path is not None
        call = available(f"{name}, {direction}", make_call, required)
        result = None if call is None else available(f"{name}, {direction}", call, required)
        if result is None:
            continue
        calls[name] = call
        comparable = contestants[name].comparable
        if comparable is not None:
            results[name] = comparable(result)
    check_agreement(results)
    return calls


def available(name: str, call: Callable[[], Any], required: bool = False) -> Any:
    """The call's result; None, and a line that says so, where torch has no kernel for it and it is not required."""
    try:
        return call()
    except RuntimeError as error:
        if required:
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        print(f"  {name}: not available: {reason[0][:200]}", flush=True)
        return None


def check_agreement(results: Mapping[str, Sequence[Tensor]]) -> None:
    """All contestants compute the same tensors, to 16-bit rounding, before any is timed."""
    if OURS not in results:
        return
    for name, tensors in results.items():
        for actual, expected in zip(tensors, results[OURS], strict=True):
            difference = (actual.float() - expected.float()).norm() / expected.float().norm()
            if not difference < 1e-2:
                raise RuntimeError(f"{name} differs from ours by a relative {difference:.2e}")


def timed_rows(
    times: Mapping[str, Timing | None],
    contestants: Mapping[str, Contestant],
    case: Mapping[str, Any],
    flops: float | None = None,
) -> list[dict[str, Any]]:
    """A row for each contestant; ``speedup_of_ours`` is its time over ours."""
    ours = times.get(OURS)
    rows = []
    for name, time in times.items():
        row: dict[str, Any] = {**case, "contestant": name, "path": contestants[name].path}
        if flops is not None:
            row["tflops"] = round(flops / time.median_us * 1e-6, 1) if time else None
        for field in ("median_us", "p20_us", "p80_us"):
            row[field] = round(getattr(time, field), 2) if time else None
        row["speedup_of_ours"] = round(time.median_us / ours.median_us, 3) if time and ours else None
        rows.append(row)
    return rows


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def parse_arguments(
    benchmark: str,
    summary: str,
    *,
    by_direction: bool,
    full_help: str | None,
    command_line: Sequence[str] | None = None,
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--json", default=f"{benchmark}.json", help="result file (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one size, fewer samples")
    if by_direction:
        parser.add_argument(
            "--direction", choices=(*DIRECTIONS, "both"), default="both", help="default: %(default)s"
        )
    if full_help is not None:
        parser.add_argument("--full", action="store_true", help=full_help)
    arguments = parser.parse_args(command_line)
    if by_direction:
        both = arguments.direction == "both"
        arguments.directions = tuple(DIRECTIONS) if both else (arguments.direction,)
    return arguments


def run(
    benchmark: str,
    summary: str,
    cases: Callable[[argparse.Namespace], Iterator[list[dict[str, Any]]]],
    *,
    by_direction: bool = False,
    full_help: str | None = None,
) -> None:
    """The command line of a benchmark; ``cases(arguments)`` gives the rows of one case after the other, and after each
    of them the result is written, so that a run that is cut off keeps what it had.

    With ``by_direction`` it can run one direction alone: ``arguments.directions`` are those asked for.
    """
    arguments = parse_arguments(benchmark, summary, by_direction=by_direction, full_help=full_help)
    ceilings = measure_ceilings()
    print(f"ceilings: {ceilings}", flush=True)
    rows: list[dict[str, Any]] = []
    for measured in cases(arguments):
        for row in measured:
            for figure, (share, ceiling) in SHARES.items():
                if figure in row:
                    value = row[figure] and round(row[figure] / ceilings[ceiling], 3)
                    row = {**row, share: value}
            rows.append(row)
            print("  ".join(str(value) for value in row.values()), flush=True)
        write_result(arguments.json, benchmark, rows, ceilings)
