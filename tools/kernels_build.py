"""Makes `build_support` of flash-attn-kernels importable; imported before it."""

from __future__ import annotations

import sys

from repository import packages

KERNELS = packages()[0]
LIBRARY = KERNELS.source / KERNELS.module / "lib" / "libflash_attn_kernels.so"

sys.path.insert(0, str(KERNELS.folder))
