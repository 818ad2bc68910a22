"""Options of the strategy group: how the work is spread over devices."""

# No `from __future__ import annotations` here: OmegaConf reads the annotations as types.

from dataclasses import dataclass

from flash_attn_train.configs.option import option

_SHARDED_HELP = (
    "checkpoints as folders into which every rank writes its part; false: single files, which rank 0 gathers. "
    "Both resume with any number of devices and any strategy"
)


@dataclass
class StrategyConfig:
    """What every strategy has."""


@dataclass
class SingleDeviceConfig(StrategyConfig):
    """One process on one device."""


@dataclass
class DistributedConfig(StrategyConfig):
    """What every strategy for several devices has."""

    timeout_minutes: float = option(
        30.0, "how long a rank waits for the others before it gives up", above=0.0
    )


@dataclass
class DDPConfig(DistributedConfig):
    """Data parallel: every device has all of the model and its own part of each batch; gradients are averaged."""

    static_graph: bool = option(
        False, "promise that every step uses the same parameters: DDP then overlaps more"
    )
    compression: str = option(
        "none",
        "format in which gradients travel: cast, divided by the number of devices, then added up",
        choices=("none", "fp16", "bf16"),
    )
    bucket_mb: float = option(25.0, "gradients that travel together, in MiB", above=0.0)


@dataclass
class AutoStrategyConfig(DDPConfig):
    """``single`` for one device, ``ddp`` for more."""


@dataclass
class Zero1Config(DDPConfig):
    """DDP, with the optimizer's state spread over the devices (ZeRO-1)."""

    sharded_checkpoints: bool = option(False, _SHARDED_HELP)


@dataclass
class FSDP2Config(DistributedConfig):
    """Parameters, gradients and optimizer state spread over the devices (ZeRO-3, or ZeRO-2)."""

    reshard_after_forward: bool = option(
        True, "give each layer's gathered parameters up after its forward pass: ZeRO-3; false: ZeRO-2"
    )
    reduce_dtype: str = option(
        "float32", "format in which gradients are averaged", choices=("float32", "bfloat16")
    )
    sharded_checkpoints: bool = option(True, _SHARDED_HELP)


@dataclass
class TensorParallelConfig(DistributedConfig):
    """Every layer spread over a few devices; over what devices there are beyond these, data parallel by FSDP2."""

    tensor_parallel_size: int = option(2, "devices that share each layer", at_least=1)
    sequence_parallel: bool = option(True, "between layers, each of them has a part of the tokens")
    reshard_after_forward: bool = option(
        True, "give each layer's gathered parameters up after its forward pass: ZeRO-3; false: ZeRO-2"
    )
    reduce_dtype: str = option(
        "float32", "format in which gradients are averaged", choices=("float32", "bfloat16")
    )


# Config group `strategy`: name on the command line -> schema.
STRATEGIES: dict[str, type[StrategyConfig]] = {
    "auto": AutoStrategyConfig,
    "single": SingleDeviceConfig,
    "ddp": DDPConfig,
    "zero1": Zero1Config,
    "fsdp2": FSDP2Config,
    "tensor_parallel": TensorParallelConfig,
}
