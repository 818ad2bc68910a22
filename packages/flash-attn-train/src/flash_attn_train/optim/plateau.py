"""The one schedule with a memory: the rate falls when the validation loss no longer does."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from flash_attn_train.optim.schedule import warmup


class WarmupPlateau(ReduceLROnPlateau):
    """torch's ReduceLROnPlateau with a warmup, and with one factor for all parameter groups.

    The rate of a group is ``its peak * warmup(step) * scale``. It is set after every optimizer step; the validation
    loss is looked at after every ``val_every_n_steps`` of them, once. So :meth:`step` may be called after each
    optimizer step with the latest validation loss, as Lightning does, and at the end of a validation besides.

    All of its state is in :meth:`state_dict`, as plain values.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        warmup_steps: int,
        val_every_n_steps: int,
        factor: float,
        patience: int,
        threshold: float,
        min_lr_ratio: float,
    ) -> None:
        super().__init__(optimizer, factor=factor, patience=patience, threshold=threshold)
        self.warmup_steps, self.val_every_n_steps = warmup_steps, val_every_n_steps
        self.min_lr_ratio = min_lr_ratio
        self.scale = 1.0
        # Of the optimizer, counted by itself: a step that a loss scaler leaves out does not count, and the loss is then
        # looked at that much later.
        self.num_steps = 0
        self.looked_at = 0  # num_steps when the loss was last looked at
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        optimizer.register_step_post_hook(self._after_step)
        self._set_rates()

    def step(self, metrics: Any, epoch: int | None = None) -> None:  # type: ignore[override]
        """Looks at the validation loss (a number or scalar tensor) if it is due, and ignores it otherwise."""
        if self.num_steps == self.looked_at or self.num_steps % self.val_every_n_steps:
            return
        self.looked_at = self.num_steps
        super().step(float(metrics))
        self._set_rates()

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().state_dict().items() if name != "optimizer"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._set_rates()

    def _reduce_lr(self, epoch: int) -> None:
        # Called by torch's class when patience is at its end.
        self.scale = max(self.scale * self.factor, self.min_lr_ratio)

    def _after_step(self, *_: Any) -> None:
        self.num_steps += 1
        self._set_rates()

    def _set_rates(self) -> None:
        factor = warmup(self.num_steps, self.warmup_steps) * self.scale
        for group, base_lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base_lr * factor
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
