"""What happens at a loss or gradient that is not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import pytorch_lightning as pl
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor

from flash_attn_train.atomic import atomic_write
from flash_attn_train.callbacks.measurement import Measurement, Window, is_record_due
from flash_attn_train.callbacks.norms import l2_norm
from flash_attn_train.callbacks.processes import any_process
from flash_attn_train.console import say
from flash_attn_train.errors import TrainingError

# Batches that wait for their check are kept up to this size.
_KEPT_BYTES = 64 * 2**20


class NaNGuard(Measurement):
    """Stops the run, or skips the step, where the loss or the gradient norm is NaN or infinite.

    ``stop``: the losses of a step are looked at with the next training record, validation or checkpoint, whichever
    comes first, so that between them nothing waits for the device; and before the batches since the last look need more
    than 64 MiB. So no checkpoint is written after a bad step, and the last good one stays. The bad step's batches
    are saved, and :class:`TrainingError` is raised in all processes.

    ``skip``: looked at in every step, which waits for the device each time (more time per step, where steps are short).
    A bad step changes neither weights nor the optimizer's state; it counts as a step. ``skipped_steps`` is in the
    training record. After too many in a row the run stops. The first skipped step's batches are saved.

    With fp16, an infinite gradient is the loss scaler's business, and only the loss is looked at.

    Args:
        folder: where ``nan_batch.pt`` goes (``nan_batch_rank3.pt`` of other processes): step, losses (of masked
            language models per position, not per hidden token), gradient norm and the batches of one step, for
            ``torch.load``.
        mode: "stop" or "skip".
        every_n_steps: steps between training records.
        max_skipped_in_a_row: skipped steps one after the other before the run stops.
    """

    def __init__(
        self, folder: Path, *, mode: str, every_n_steps: int, max_skipped_in_a_row: int = 10
    ) -> None:
        self.folder, self.mode = folder, mode
        self.every_n_steps, self.max_skipped_in_a_row = every_n_steps, max_skipped_in_a_row
        self.skipped = self.skipped_in_a_row = 0
        self._batch: Any = None
        self._pending: list[tuple[int, Any, Tensor]] = []  # step, batch and loss of each forward pass
        self._norms: dict[int, Tensor] = {}  # step -> gradient norm
        self._step = 0
        self._most_steps: int | None = None  # between two looks
        self._saved = False

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]
        self.skipped_in_a_row = state_dict["skipped_in_a_row"]

    def measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, window: Window) -> dict[str, float]:
        return {"skipped_steps": self.skipped} if self.mode == "skip" else {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch = batch
        if self._most_steps is None:
            # The same on all processes, which look together.
            affordable = _KEPT_BYTES // (_num_bytes(batch) * trainer.accumulate_grad_batches)
            self._most_steps = trainer.strategy.broadcast(max(1, affordable))

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._pending.append((trainer.global_step + 1, self._batch, loss.detach()))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self.mode != "skip":
            return
        with_gradient = [p for p in pl_module.parameters() if p.grad is not None]
        gradients = [p.grad for p in with_gradient if p.grad is not None]
        if gradients and not _has_scaler(trainer):
            self._norms[trainer.global_step + 1] = l2_norm(gradients)
        is_bad_here = self._first_bad_step() is not None
        if any_process(trainer, is_bad_here):
            self._skip(trainer, with_gradient, is_bad_here)
        else:
            self.skipped_in_a_row = 0
        self._forget()

    def _skip(self, trainer: pl.Trainer, with_gradient: list[torch.nn.Parameter], is_bad_here: bool) -> None:
        step = trainer.global_step + 1
        self.skipped += 1
        self.skipped_in_a_row += 1
        if is_bad_here and not self._saved:
            self._save(trainer, step)
        if self.skipped_in_a_row > self.max_skipped_in_a_row:
            self._stop(
                trainer,
                f"steps {step - self.max_skipped_in_a_row} to {step} had a loss or gradient that is not finite",
                "raise callbacks.nan_guard.max_skipped_in_a_row",
            )
        for parameter in with_gradient:
            parameter.grad = None  # optimizers leave a parameter without gradient alone, and its state
        if trainer.is_global_zero:
            say(
                f"step {step}/{trainer.max_steps}  skipped: its loss or gradient is not finite ({self.skipped} so far)"
            )

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step == self._step or self.mode == "skip":
            return
        self._step = trainer.global_step
        grad_norm = getattr(pl_module, "grad_norm", None)
        if grad_norm is not None and not _has_scaler(trainer):
            self._norms[self._step] = torch.as_tensor(grad_norm)
        assert self._most_steps is not None
        due = is_record_due(trainer, self._step, self.every_n_steps)
        if due or self._step - self._pending[0][0] + 1 >= self._most_steps:
            self._look(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._look(trainer)

    def _look(self, trainer: pl.Trainer) -> None:
        if not self._pending or self.mode == "skip":
            return
        step = self._first_bad_step()
        if any_process(trainer, step is not None):
            # What is pending stays: a checkpoint that something tries to write after this is refused too.
            if step is None:
                self._stop(trainer, "in another process, a loss is not finite")
            self._save(trainer, step)
            self._stop(trainer, f"the loss or gradient of step {step} is not finite")
        self._forget()

    def _first_bad_step(self) -> int | None:
        """Looks at everything that is pending; waits for the device once."""
        steps = [*(step for step, _, _ in self._pending), *self._norms]
        values = [*(loss for _, _, loss in self._pending), *self._norms.values()]
        device = self._pending[0][2].device
        finite = torch.isfinite(torch.stack([value.float().to(device) for value in values])).tolist()
        return min((step for step, good in zip(steps, finite, strict=True) if not good), default=None)

    def _forget(self) -> None:
        self._pending, self._norms = [], {}

    def _save(self, trainer: pl.Trainer, step: int) -> None:
        if self._saved:
            return
        self._saved = True
        passes = [(batch, loss) for number, batch, loss in self._pending if number == step]
        norm = self._norms.get(step)
        content = {
            "step": step,
            "losses": [float(loss) * trainer.accumulate_grad_batches for _, loss in passes],
            "grad_norm": None if norm is None else float(norm),
            "batches": apply_to_collection(
                [batch for batch, _ in passes], Tensor, lambda t: t.detach().cpu()
            ),
        }
        with atomic_write(self._file(trainer)) as file:
            torch.save(content, file)

    def _file(self, trainer: pl.Trainer) -> Path:
        rank = trainer.global_rank
        return self.folder / ("nan_batch.pt" if rank == 0 else f"nan_batch_rank{rank}.pt")

    def _stop(self, trainer: pl.Trainer, what: str, way_out: str = "set trainer.nan=skip") -> NoReturn:
        where = f"; its batch is in {self._file(trainer)}" if self._file(trainer).exists() else ""
        raise TrainingError(
            f"{what}{where}. No checkpoint was written since. Lower optimizer.lr, lengthen scheduler.warmup_steps, or "
            f"{way_out}, and continue with resume=true."
        )


def _has_scaler(trainer: pl.Trainer) -> bool:
    plugin = trainer.precision_plugin
    return isinstance(plugin, MixedPrecision) and plugin.scaler is not None


def _num_bytes(batch: Any) -> int:
    sizes: list[int] = [1]
    apply_to_collection(batch, Tensor, lambda tensor: sizes.append(tensor.nbytes))
    return sum(sizes)
