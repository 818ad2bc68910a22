"""What the tests and benchmarks of every layer share: tolerance law, pairwise coverage, graphs, and honest timing."""

from .cuda_graph import captured
from .pairwise import pairwise
from .timing import Timing, interleaved_times, measure_ceilings, write_result
from .tolerance import assert_within_reference_error

__all__ = [
    "Timing",
    "assert_within_reference_error",
    "captured",
    "interleaved_times",
    "measure_ceilings",
    "pairwise",
    "write_result",
]
