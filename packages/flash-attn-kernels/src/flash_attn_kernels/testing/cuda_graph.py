"""CUDA graphs, for tests and benchmarks of what replays."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Results = TypeVar("Results")


def captured(step: Callable[[], Results], *, warmups: int = 1) -> tuple[torch.cuda.CUDAGraph, Results]:
    """A graph of the step, which has run ``warmups`` times before, and the step's results, which every replay
    overwrites."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmups):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results
