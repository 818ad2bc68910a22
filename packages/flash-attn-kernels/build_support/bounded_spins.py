"""FLASH_ATTN_KERNELS_BOUNDED_SPINS: 1 builds kernels whose waits end, with a report, for bringing kernels up.

See csrc/ptx/spin_limit.cuh. Counting costs registers, so that such a build may spill.
"""

from __future__ import annotations

import os

from build_support.errors import BuildError

VARIABLE = "FLASH_ATTN_KERNELS_BOUNDED_SPINS"
FLAG = "-DFLASH_ATTN_BOUNDED_SPINS"


def bounded_spins_requested() -> bool:
    """From the environment variable; BuildError for a value that is neither 0 nor 1."""
    value = os.environ.get(VARIABLE, "") or "0"
    if value not in ("0", "1"):
        raise BuildError(f"{VARIABLE}: got {value!r}, expected 0 or 1")
    return value == "1"
