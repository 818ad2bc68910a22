"""An optimizer of which every rank has the state of some parameters."""

from __future__ import annotations

import inspect

from pytorch_lightning.strategies import Strategy
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer

from flash_attn_train.distributed.strategies import Zero1Strategy


def distribute_optimizer(optimizer: Optimizer, strategy: Strategy) -> Optimizer:
    """The optimizer that the strategy needs in place of one that no step was made with: for zero1, torch's
    ZeroRedundancyOptimizer around it, for the others itself.

    To be called in ``configure_optimizers``, before a scheduler is made for it.
    """
    if not isinstance(strategy, Zero1Strategy):
        return optimizer
    accepted = inspect.signature(type(optimizer)).parameters
    settings = {name: value for name, value in optimizer.defaults.items() if name in accepted}
    return ZeroRedundancyOptimizer(optimizer.param_groups, type(optimizer), **settings)
