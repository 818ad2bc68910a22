"""last.ckpt, to resume from, best.ckpt, and those that are kept besides."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities.exceptions import SIGTERMException

from flash_attn_train.atomic import link_path, remove_path
from flash_attn_train.console import say
from flash_attn_train.distributed import (
    Interruption,
    data_parallel_rank,
    from_all_ranks,
    is_lightning_child,
    on_rank_zero,
    requeue_job,
    seed_rank,
    world_size,
)
from flash_attn_train.errors import CheckpointError
from flash_attn_train.rng import rng_state, set_rng_state


class RunCheckpoint(pl.callbacks.Checkpoint):
    """Writes ``last`` every so many steps and after the last one, and ``best`` when the validation loss is
    the lowest.

    A checkpoint of a step at which validation is due is written after the validation, so that a resumed run
    neither repeats it nor misses it. (Lightning's ModelCheckpoint writes before, and its resumed run misses
    it.) A validation loss that is not finite is never the best one. Checkpoints hold the state of every rank's random
    generators, the config and the key of the training text.

    SIGTERM, and under SLURM the warning before the job's time is over, write ``last`` at the end of the step and
    stop the run; then SLURM is asked to queue the job again. Other errors in a run of one process leave
    ``interrupted.ckpt`` of the last complete step beside ``last``.

    Args:
        last, best: files to write; folders, where the strategy's checkpoints are.
        every_n_steps, val_every_n_steps: intervals of ``last`` and of the trainer's validation, in optimizer
            steps.
        config: flat dict of plain values, see :func:`flash_attn_train.configs.checks.flatten`.
        data_key: see :class:`flash_attn_train.data.PreparedData`.
        keep_every_n_steps: interval of checkpoints that are kept, ``step-N.ckpt``; None for none.
        keep_top_k: how many of those with the lowest validation losses are kept; beyond one, as
            ``best-step-N.ckpt``.
        save_on_error: whether errors leave a checkpoint.
    """

    def __init__(
        self,
        last: Path,
        best: Path,
        *,
        every_n_steps: int,
        val_every_n_steps: int,
        config: dict[str, Any],
        data_key: str,
        keep_every_n_steps: int | None = None,
        keep_top_k: int = 1,
        save_on_error: bool = True,
    ) -> None:
        self.last, self.best = last, best
        self.every_n_steps, self.val_every_n_steps = every_n_steps, val_every_n_steps
        self.config, self.data_key = config, data_key
        self.keep_every_n_steps, self.keep_top_k, self.save_on_error = (
            keep_every_n_steps,
            keep_top_k,
            save_on_error,
        )
        self.best_loss = math.inf
        self.kept: dict[str, float] = {}  # name of a checkpoint among the best -> validation loss
        self.interruption = Interruption()
        self._step = 0
        self._saved_step = -1  # of last
        self._updating = False
        self._rng_to_restore: list[dict[str, Any]] | None = None
        # What loops and generators were at the end of the last step: a checkpoint after an error is of that moment.
        self._step_end: dict[str, Any] | None = None
        self._saves_step_end = False

    @property
    def interrupted(self) -> Path:
        return self.last.with_name("interrupted.ckpt")

    def state_dict(self) -> dict[str, Any]:
        at_step_end = self._step_end if self._saves_step_end else None
        rng = from_all_ranks(rng_state()) if at_step_end is None else [at_step_end["rng"]]
        return {"best_loss": self.best_loss, "kept": dict(self.kept), "rng": rng}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_loss, self.kept = state_dict["best_loss"], dict(state_dict["kept"])
        self._rng_to_restore = state_dict["rng"]

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        _recount_forward_passes(checkpoint, trainer.accumulate_grad_batches)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["config"] = self.config
        checkpoint["data_key"] = self.data_key
        if self._saves_step_end:
            assert self._step_end is not None
            checkpoint["loops"] = self._step_end["loops"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        self.interruption.install(trainer)
        if self._rng_to_restore is None:
            self._seed(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        # As late as possible: setting up the resumed run must not draw from the restored generators.
        if self._rng_to_restore is not None:
            states, self._rng_to_restore = self._rng_to_restore, None
            if len(states) == trainer.world_size:
                set_rng_state(states[trainer.global_rank])
            else:
                self._seed(trainer)

    def on_before_optimizer_step(self, *args: Any) -> None:
        self._updating = True

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self._step:  # gradients are still being accumulated
            return
        self._step, self._updating = trainer.global_step, False
        validation_comes = self._step % self.val_every_n_steps == 0 or self._step == trainer.max_steps
        if not validation_comes:
            self._end_step(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:  # the validation before the first step
            return
        loss = trainer.callback_metrics["val/loss"].item()
        if math.isfinite(loss):  # NaN compares with nothing: no later loss would be the lowest
            self._save_if_among_best(trainer, loss)
        self._end_step(trainer)

    def _save_if_among_best(self, trainer: pl.Trainer, loss: float) -> None:
        is_best = loss < self.best_loss
        self.best_loss = min(loss, self.best_loss)
        among_best = self._enter(f"best-step-{self._step}.ckpt", loss)
        if is_best:
            self._save(trainer, self.best)
            if among_best is not None:
                self._link(self.best, self.best.with_name(among_best))
        elif among_best is not None:
            self._save(trainer, self.best.with_name(among_best))

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self.interruption.restore()
        stopped = isinstance(exception, (KeyboardInterrupt, SystemExit))
        # What Ctrl-C stopped is resumed like any other run; after an error one must say so, since what is wrong may
        # be in the weights.
        path = self.last if stopped else self.interrupted
        if self._is_worth_saving(trainer, exception):
            self._save_step_end(trainer, path)
        # SIGTERM arrives as a SystemExit.
        if stopped and self.last.exists() and trainer.is_global_zero:
            say(f"interrupted at step {trainer.global_step}; resume=true continues from {self.last}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.interruption.restore()

    def _end_step(self, trainer: pl.Trainer) -> None:
        step = self._step
        keeps = self.keep_every_n_steps is not None and step % self.keep_every_n_steps == 0
        if step % self.every_n_steps == 0 or step == trainer.max_steps or keeps:
            self._save(trainer, self.last)
        if keeps:
            self._link(self.last, self.last.with_name(f"step-{step}.ckpt"))
        asked = self.interruption.requested()
        if asked is not None and step < trainer.max_steps:
            self._stop(trainer, asked)
        if self.save_on_error and trainer.world_size == 1:
            loops = trainer._checkpoint_connector._get_loops_state_dict()
            self._step_end = {"rng": rng_state(), "loops": loops, "step": step}

    def _stop(self, trainer: pl.Trainer, asked: signal.Signals) -> None:
        if self._saved_step != self._step:
            self._save(trainer, self.last)
        if asked != signal.SIGTERM and trainer.is_global_zero:
            say(requeue_job())
        # Lightning kills the others when one of the processes that it started reports a failure.
        raise SIGTERMException(0 if is_lightning_child() else 128 + asked)

    def _is_worth_saving(self, trainer: pl.Trainer, exception: BaseException) -> bool:
        # With several ranks an error comes to one of them, and the others do not know that they should save. In the
        # middle of an update there is no step that the weights belong to.
        return (
            self._step_end is not None
            and not self._updating
            and self._step_end["step"] == trainer.global_step != self._saved_step
            and not isinstance(exception, CheckpointError)
        )

    def _save_step_end(self, trainer: pl.Trainer, path: Path) -> None:
        self._saves_step_end = True
        try:
            trainer.save_checkpoint(path)
        except Exception as error:  # the first error is the one to be seen
            say(f"no checkpoint of step {trainer.global_step}: {error}")
        else:
            if path == self.interrupted:
                say(f"stopped by an error; {path} has step {trainer.global_step}: resume={path} continues")
        finally:
            self._saves_step_end = False

    def _save(self, trainer: pl.Trainer, path: Path) -> None:
        trainer.save_checkpoint(path)
        if path == self.last:
            self._saved_step = self._step

    def _link(self, source: Path, path: Path) -> None:
        _once(lambda: link_path(source, path))

    def _enter(self, name: str, loss: float) -> str | None:
        """Enters a checkpoint among the best; its name if it is one of them. Removes what no longer is."""
        if self.keep_top_k < 2:
            return None
        ranking = sorted({**self.kept, name: loss}.items(), key=lambda entry: entry[1])
        self.kept = dict(ranking[: self.keep_top_k])
        for gone, _ in ranking[self.keep_top_k :]:
            if gone != name:
                _once(partial(remove_path, self.best.with_name(gone)))
        return name if name in self.kept else None

    def _seed(self, trainer: pl.Trainer) -> None:
        """Gives each rank with data of its own random numbers of its own."""
        rank, size = data_parallel_rank(trainer)
        if size > 1:
            seed_rank(self.config.get("seed", 0), trainer.global_step, rank)


def _recount_forward_passes(checkpoint: dict[str, Any], accumulate: int) -> None:
    """Makes Lightning's counters those of a run that has always made so many forward passes per step.

    By them it knows which forward pass is the last of a step, and when validation is due. They are of the end of a
    step, and another batch size or number of devices can make a step of as many samples in more or fewer passes.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counters in (progress["total"], progress["current"]):
        more = checkpoint["global_step"] * accumulate - counters["ready"]
        counters.update({name: count + more for name, count in counters.items()})


def _once(function: Callable[[], None]) -> None:
    """Calls a function on rank 0 while the others wait."""
    if world_size() == 1:
        function()
    else:
        on_rank_zero(function)
