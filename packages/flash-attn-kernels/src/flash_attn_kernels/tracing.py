"""What torch.compile is told about functions of this package."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def constant_under_compile(function: Function) -> Function:
    """torch.compile calls ``function`` once, while tracing, and treats the answer as a constant.

    This is ``torch.compiler.assume_constant_result``, which only sets this mark; calling it would import the whole
    compiler, two seconds, whenever the package is imported.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
