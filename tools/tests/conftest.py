"""Makes the tools, and through them build_support, importable."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import kernels_build  # noqa: F401
