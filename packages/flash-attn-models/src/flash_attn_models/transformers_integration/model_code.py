"""What the attention classes of a transformers model do with an implementation by name: read from their code.

A mask function is told of the config alone, and the models of a family are beside its config.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

from flash_attn_models.errors import bad_argument


@dataclass(frozen=True)
class _AttentionCode:
    """What was read of a family.

    Attributes:
        is_fixed: attention calls no function by name.
        has_window: it is called with the window.
    """

    is_fixed: bool
    has_window: bool


def refuse_own_attention(config: Any) -> None:
    """Raise ValueError for the config of a model whose attention calls no function by name (BLOOM, XGLM). transformers
    lets it have any implementation and asks for that one's mask, of which a None would mean "everything is visible"."""
    if config is not None and _is_fixed(_home(config)):
        raise bad_argument(
            "attn_implementation",
            f"{config._attn_implementation!r} for a {type(config).__name__}",
            "a model whose attention can be replaced, which in transformers this one's cannot",
            "use attn_implementation='eager'",
        )


def tells_of_windows(config: Any) -> bool:
    """Whether attention is called with the window. The layers of some families (Phi-MoE, Qwen2-MoE) leave it to the
    mask. True for what is not of transformers."""
    return config is None or _has_window(_home(config))


def _home(config: Any) -> str:
    """The package of transformers that the config, or what it is derived from, is of; otherwise ""."""
    packages = (cls.__module__.rpartition(".")[0] for cls in type(config).__mro__)
    return next((package for package in packages if package.startswith("transformers.models.")), "")


def allow_while_compiling() -> None:
    """Let torch.compile take what is read here for constants. Not done on import, since it loads the compiler."""
    for function in (_is_fixed, _has_window):
        torch.compiler.assume_constant_result(function)


# Functions with a cache cannot be such constants themselves.


def _is_fixed(package: str) -> bool:
    return _read(package).is_fixed


def _has_window(package: str) -> bool:
    return _read(package).has_window


@functools.cache
def _read(package: str) -> _AttentionCode:
    loaded = [module for name, module in list(sys.modules.items()) if name.startswith(f"{package}.modeling_")]
    modules = loaded if package else []
    classes = [cls for module in modules for cls in _attention_classes(module)]
    names = {module.__name__ for module in modules}
    has_own = any(cls.__module__ in names for cls in classes)
    return _AttentionCode(
        is_fixed=has_own and not any(hasattr(module, "ALL_ATTENTION_FUNCTIONS") for module in modules),
        has_window=not classes or any("sliding_window" in _keywords(cls) for cls in classes),
    )


def _attention_classes(module: ModuleType) -> Iterator[type[nn.Module]]:
    for name, value in vars(module).items():
        if "Attention" in name and isinstance(value, type) and issubclass(value, nn.Module):
            yield value


def _keywords(attention: type[nn.Module]) -> set[str]:
    """Names of keyword arguments in calls that forward makes."""
    code = inspect.unwrap(attention.forward).__code__
    return {name for constant in code.co_consts if isinstance(constant, tuple) for name in constant}
