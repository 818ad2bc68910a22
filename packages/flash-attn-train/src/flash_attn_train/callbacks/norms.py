"""Norms of weights and gradients."""

from __future__ import annotations

import re

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flash_attn_train.callbacks.measurement import Measurement, Window, is_record_due


class NormMonitor(Measurement):
    """Adds ``weight_norm`` to the training record, and by option ``weight_norm/LAYER`` and ``grad_norm/LAYER``.

    L2 norms; of the weights after the step, and of the gradients before clipping. (``grad_norm``, of all gradients, is
    in the record anyway.) A layer is a member of a module list, such as "transformer.layers.3"; what is in none is
    one with its module. Nothing is computed between records, and a record waits for the device once. With FSDP2 the
    norms are those of the whole tensors.

    Args:
        every_n_steps: steps between training records.
        per_layer: also of each layer.
    """

    def __init__(self, *, every_n_steps: int, per_layer: bool = False) -> None:
        self.every_n_steps, self.per_layer = every_n_steps, per_layer
        self._gradients: dict[str, Tensor] = {}

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self.per_layer and is_record_due(trainer, trainer.global_step + 1, self.every_n_steps):
            layers = layers_of(pl_module.model)  # type: ignore[arg-type]
            gradients = {
                layer: [p.grad for p in parts if p.grad is not None] for layer, parts in layers.items()
            }
            self._gradients = {f"grad_norm/{layer}": l2_norm(g) for layer, g in gradients.items() if g}

    @torch.no_grad()
    def measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, window: Window) -> dict[str, float]:
        layers = layers_of(pl_module.model)  # type: ignore[arg-type]
        weights = {f"weight_norm/{layer}": l2_norm(parameters) for layer, parameters in layers.items()}
        total = torch.linalg.vector_norm(torch.stack(list(weights.values())))
        norms = {"weight_norm": total, **(weights | self._gradients if self.per_layer else {})}
        self._gradients = {}
        return dict(zip(norms, torch.stack(list(norms.values())).tolist(), strict=True))


def layers_of(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Layer -> its parameters that are trained."""
    layers: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            member = re.match(r".*?\.\d+(?=\.)", name)
            layer = member.group() if member else name.rpartition(".")[0] or name
            layers.setdefault(layer, []).append(parameter)
    return layers


def l2_norm(tensors: list[nn.Parameter] | list[Tensor]) -> Tensor:
    """L2 norm of all elements of at least one tensor, a float32 scalar on the device; of DTensors, the whole ones."""
    norm = torch.nn.utils.get_total_norm(tensors)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).float()
