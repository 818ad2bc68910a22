"""What the tests and benchmarks of every layer share: the tolerance law, pairwise coverage, and honest timing."""

from .pairwise import pairwise
from .timing import Timing, interleaved_times, measure_ceilings, write_result
from .tolerance import assert_within_reference_error

__all__ = [
    "Timing",
    "assert_within_reference_error",
    "interleaved_times",
    "measure_ceilings",
    "pairwise",
    "write_result",
]
