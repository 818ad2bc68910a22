"""The model's modules as a table."""

from __future__ import annotations

from collections.abc import Iterator

import pytorch_lightning as pl
from torch import nn

from flash_attn_train.console import say


class ModelTable(pl.Callback):
    """Prints :func:`model_table` before training.

    (Lightning's ModelSummary writes into a log that this package keeps quiet, repeats every layer, and shows 0 FLOPs of
    a model without example inputs.)
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            say(model_table(pl_module.model))  # type: ignore[arg-type]


def model_table(model: nn.Module, max_depth: int = 4) -> str:
    """Name, class and parameters of the modules, down to ``max_depth`` levels; of the elements of a list, the first
    one stands for all. With tensor parallelism parameters are those of a rank."""
    rows = list(_rows("model", model, 0, max_depth))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"{name:<{widths[0]}}  {kind:<{widths[1]}}  {count:>{widths[2]}}" for name, kind, count in rows
    )


def _rows(name: str, module: nn.Module, depth: int, max_depth: int) -> Iterator[tuple[str, str, str]]:
    count = sum(parameter.numel() for parameter in module.parameters())
    yield "  " * depth + name, type(module).__name__, f"{count:,}"
    if depth == max_depth:
        return
    children = list(module.named_children())
    if isinstance(module, nn.ModuleList) and len(children) > 1:
        children = [(f"each of {len(children)}", children[0][1])]
    for child, part in children:
        yield from _rows(child, part, depth + 1, max_depth)
