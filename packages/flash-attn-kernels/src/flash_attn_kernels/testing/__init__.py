"""What the tests and benchmarks of every layer share: the tolerance law, and honest timing."""

from .timing import Timing, interleaved_times, measure_ceilings, write_result
from .tolerance import assert_within_reference_error

__all__ = ["Timing", "assert_within_reference_error", "interleaved_times", "measure_ceilings", "write_result"]
