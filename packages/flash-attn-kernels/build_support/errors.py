"""The one exception of the build."""

from __future__ import annotations


class BuildError(RuntimeError):
    """The library cannot be built; the message says what was found, what is needed and the way out."""
