"""Libraries that only some kinds of data need."""

from __future__ import annotations

import importlib
from types import ModuleType

from flash_attn_train.errors import DataError


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Imports a library of an extra.

    Raises:
        DataError: it is not installed, or does not fit what it needs; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # torchvision of another torch raises RuntimeError
        raise DataError(
            f"{module.split('.')[0]}, which {purpose}, cannot be imported ({error}). "
            f"pip install 'flash-attn-train[{extra}]'"
        ) from error
