"""Training on several devices, by Lightning's strategies and torch.distributed."""

from flash_attn_train.distributed.build import build_strategy, data_parallel_size
from flash_attn_train.distributed.gradients import clip_gradients, scale_gradients
from flash_attn_train.distributed.interruption import Interruption, requeue_job
from flash_attn_train.distributed.launch import (
    cluster_environment,
    ending_process_group,
    from_all_ranks,
    is_lightning_child,
    is_rank_zero,
    local_rank,
    on_rank_zero,
    rank,
    start_process_group,
    world_size,
)
from flash_attn_train.distributed.mesh import data_parallel_rank
from flash_attn_train.distributed.parallelize import model_options, parallelize
from flash_attn_train.distributed.seeds import seed_rank
from flash_attn_train.distributed.spread import load_part
from flash_attn_train.distributed.zero1 import distribute_optimizer

__all__ = [
    "Interruption",
    "build_strategy",
    "clip_gradients",
    "cluster_environment",
    "data_parallel_rank",
    "data_parallel_size",
    "distribute_optimizer",
    "ending_process_group",
    "from_all_ranks",
    "is_lightning_child",
    "is_rank_zero",
    "load_part",
    "local_rank",
    "model_options",
    "on_rank_zero",
    "parallelize",
    "rank",
    "requeue_job",
    "scale_gradients",
    "seed_rank",
    "start_process_group",
    "world_size",
]
