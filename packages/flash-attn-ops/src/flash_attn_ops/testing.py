"""Tolerance law, graphs and timing, for the tests and benchmarks of the layer above."""

from flash_attn_kernels.testing import (
    Timing,
    assert_within_reference_error,
    captured,
    interleaved_times,
    measure_ceilings,
    write_result,
)

__all__ = [
    "Timing",
    "assert_within_reference_error",
    "captured",
    "interleaved_times",
    "measure_ceilings",
    "write_result",
]
