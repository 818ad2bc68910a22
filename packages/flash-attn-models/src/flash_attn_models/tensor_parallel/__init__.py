"""Models spread over the ranks of a process group: how, and their state dicts.

Models take ``process_group`` and ``sequence_parallel``; :class:`TensorParallel` says what these mean.
"""

from flash_attn_models.tensor_parallel.gradients import reduce_gradients
from flash_attn_models.tensor_parallel.plan import TensorParallel
from flash_attn_models.tensor_parallel.state_dict import (
    combine_state_dicts,
    gather_state_dict,
    local_parts,
    shard_state_dict,
)

__all__ = [
    "TensorParallel",
    "combine_state_dicts",
    "gather_state_dict",
    "local_parts",
    "reduce_gradients",
    "shard_state_dict",
]
