"""Timing on a GPU: contestants interleaved in one process, CUDA events, medians, ceilings of the same run."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_SPIN_CYCLES = 900_000  # about half a millisecond at the clocks of today's GPUs


@dataclass(frozen=True)
class Timing:
    """Median and 20th/80th percentile of one contestant, in microseconds."""

    median_us: float
    p20_us: float
    p80_us: float


def interleaved_times(
    contestants: Mapping[str, Callable[[], object]],
    *,
    samples: int = 30,
    warmup: int = 5,
    min_sample_us: float = 300.0,
) -> dict[str, Timing]:
    """Time every contestant in turn, round after round, so that clocks and heat drift alike for all.

    A sample is as many back-to-back calls as fill ``min_sample_us``, between two CUDA events, behind a spin of half a
    millisecond on the device that lets the host run ahead: this measures the device, and the host only where it
    cannot keep up for the whole sample.
    """
    repeats: dict[str, int] = {}
    for name, call in contestants.items():
        for _ in range(warmup):
            call()
        once = _sample_us(call, 3)
        repeats[name] = max(1, round(min_sample_us / max(once, 1.0)))
    times: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for round_index in range(samples):
        shift = round_index % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(_sample_us(contestants[name], repeats[name]))
    return {name: _summary(values) for name, values in times.items()}


def _sample_us(call: Callable[[], object], repeats: int) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(_SPIN_CYCLES)
    start.record()
    for _ in range(repeats):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e3 / repeats


def _summary(values: Sequence[float]) -> Timing:
    ordered = sorted(values)
    last = len(ordered) - 1
    return Timing(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)])


def measure_ceilings() -> dict[str, float]:
    """What this GPU does today: TFLOP/s of an 8192^3 bf16 GEMM on random data, GB/s of a 4 GB device copy."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    times = interleaved_times({"gemm": lambda: a @ b, "copy": lambda: target.copy_(source)}, samples=10)
    return {
        "gemm_tflops": round(2 * 8192**3 / times["gemm"].median_us * 1e-6, 1),
        "copy_gbps": round(2 * source.numel() * 4 / times["copy"].median_us * 1e-3, 1),
    }


def write_result(
    path: str | Path, benchmark: str, rows: Sequence[Mapping[str, Any]], ceilings: Mapping[str, float]
) -> None:
    """Write one benchmark's rows with the GPU, the versions, the date and the same-run ceilings beside them."""
    result = {
        "benchmark": benchmark,
        "gpu": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "versions": _versions(),
        "ceilings": dict(ceilings),
        "rows": [dict(row) for row in rows],
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(result, indent=1) + "\n")


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": str(torch.backends.cudnn.version()),
    }
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        versions["triton"] = None
    return versions
