"""Signals that ask a run to stop, answered at the end of an optimizer step and by all ranks at the same one."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from datetime import timedelta
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist

from flash_attn_train.distributed.launch import cpu_group

_SLURM_WARNING = signal.Signals.SIGUSR1 if hasattr(signal, "SIGUSR1") else None


class Interruption:
    """Remembers SIGTERM, and under SLURM the warning SIGUSR1 before the job's time is over (``#SBATCH
    --signal=SIGUSR1@90``), until :meth:`requested` is asked.

    Lightning's own handlers exchange messages between ranks or write checkpoints wherever in a step the signal finds
    them, and make every forward pass wait for the GPU to learn of it.
    """

    def __init__(self) -> None:
        self._signal = 0
        self._earlier: dict[signal.Signals, Any] = {}
        self._group: dist.ProcessGroup | None = None
        self._asked: tuple[torch.Tensor, Any] | None = None

    def install(self, trainer: pl.Trainer) -> None:
        """To be called when training starts, on all ranks."""
        self._signal = 0
        if trainer.world_size > 1:
            self._group = cpu_group(timedelta(hours=1))
            loop: Any = trainer.fit_loop.epoch_loop
            if hasattr(loop, "_broadcast_sigterm_tensor"):
                loop._broadcast_sigterm_tensor = lambda: None  # it waits for the GPU at every batch
        if threading.current_thread() is not threading.main_thread():
            return
        signals = [signal.SIGTERM]
        if _SLURM_WARNING is not None and "SLURM_JOB_ID" in os.environ:
            signals.append(_SLURM_WARNING)
        for number in signals:
            self._earlier[number] = signal.signal(number, self._remember)

    def requested(self) -> signal.Signals | None:
        """The signal that came to any of the ranks; to be asked once at the end of every step, by all.

        With several ranks the answer is one step old, so that none waits for another: what was known at the end of
        the step before.
        """
        if self._group is None:
            return signal.Signals(self._signal) if self._signal else None
        answer = 0
        if self._asked is not None:
            flag, message = self._asked
            message.wait()
            answer = int(flag)
        flag = torch.tensor(self._signal, dtype=torch.int32)
        self._asked = (
            flag,
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True),
        )
        return signal.Signals(answer) if answer else None

    def restore(self) -> None:
        """To be called when training has ended, in whatever way."""
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        self._earlier.clear()
        self._group, self._asked = None, None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._signal = number


def requeue_job() -> str:
    """Puts the SLURM job of this process into the queue again. Returns what to tell the user."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return f"SLURM job {job} could not be requeued: {getattr(error, 'stderr', None) or error}"
    return f"SLURM job {job} is requeued; with resume=auto it continues"
