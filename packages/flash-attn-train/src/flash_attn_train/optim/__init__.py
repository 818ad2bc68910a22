"""Parameter groups, optimizers and learning-rate schedules."""

from flash_attn_train.optim.lamb import Lamb
from flash_attn_train.optim.optimizers import OptimizerRecipe, build_optimizer, optimizer_recipe
from flash_attn_train.optim.param_groups import describe_groups, param_groups, parameter_settings
from flash_attn_train.optim.plateau import WarmupPlateau
from flash_attn_train.optim.schedule import warmup_cosine
from flash_attn_train.optim.schedulers import build_scheduler, make_schedule

__all__ = [
    "Lamb",
    "OptimizerRecipe",
    "WarmupPlateau",
    "build_optimizer",
    "build_scheduler",
    "describe_groups",
    "make_schedule",
    "optimizer_recipe",
    "param_groups",
    "parameter_settings",
    "warmup_cosine",
]
