"""What every command makes of errors and of Ctrl-C."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

from flash_attn_train.errors import UserError

P = ParamSpec("P")


def command(name: str) -> Callable[[Callable[P, int]], Callable[P, int]]:
    """Decorates the ``main`` of a command of this name, whose exit code is then what the function returns, 2 after
    printing what is wrong with the input, or 130 after Ctrl-C."""

    def decorate(main: Callable[P, int]) -> Callable[P, int]:
        @functools.wraps(main)
        def run(*arguments: P.args, **options: P.kwargs) -> int:
            try:
                return main(*arguments, **options)
            except UserError as error:
                print(f"{name}: error: {error}", file=sys.stderr)
                return 2
            except KeyboardInterrupt:
                print(f"{name}: interrupted", file=sys.stderr)
                return 130

        return run

    return decorate
