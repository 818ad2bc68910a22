"""Parameter groups and the learning-rate schedule."""

from flash_attn_train.optim.param_groups import param_groups
from flash_attn_train.optim.schedule import warmup_cosine

__all__ = ["param_groups", "warmup_cosine"]
