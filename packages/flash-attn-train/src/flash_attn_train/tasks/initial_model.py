"""The model that a run begins with."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from flash_attn_train.configs import TrainConfig
from flash_attn_train.distributed import load_part, model_options, parallelize
from flash_attn_train.models import DataSizes, build_model
from flash_attn_train.warm_start import load_warm_start


def initial_model(config: TrainConfig, sizes: DataSizes, mesh: DeviceMesh | None) -> nn.Module:
    """Built, with its first weights, and spread as the strategy says; all ranks call this.

    Random weights depend on the seed alone: they are drawn on the CPU, the same on all ranks and devices with every
    strategy, and parts of the same with tensor parallelism. The strategy moves them to the device.

    Args:
        config: of the run, resolved.
        sizes: what the data decide about the model.
        mesh: Lightning's; None for strategies without one.

    Raises:
        ConfigError: the options do not make a model.
        CheckpointError: the weights of ``model.warm_start`` do not fit.
    """
    options = model_options(config.strategy, mesh)
    model = _seeded(config, sizes, **options)
    source, skip = config.model.warm_start, config.model.warm_start_skip
    if source is not None and not options:
        load_warm_start(model, source, skip=skip)
    elif source is not None:
        # Names and shapes are those of a whole model, and so are initial values that stay.
        whole = _seeded(config, sizes)
        load_warm_start(whole, source, skip=skip)
        load_part(model, whole.state_dict(), mesh)
    return parallelize(model, config, mesh)


def _seeded(config: TrainConfig, sizes: DataSizes, **options: object) -> nn.Module:
    # The device is named since some of Lightning's strategies make theirs the default here.
    with torch.random.fork_rng(), torch.device("cpu"):
        torch.manual_seed(config.seed)
        return build_model(config.model, sizes, **options)
