"""Lightning's strategies, with checkpoints that are whole, fail on all ranks alike, and resume on other numbers of
devices."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer

from flash_attn_train.distributed import checkpoint_folder as folders
from flash_attn_train.distributed.launch import on_rank_zero
from flash_attn_train.distributed.mesh import tensor_parallel_mesh
from flash_attn_train.distributed.optimizer_state import named_state, numbered_state, renamed_state
from flash_attn_train.distributed.spread import Cuts, cuts_of, spread_like, whole_of
from flash_attn_train.errors import CheckpointError, ConfigError


class DataParallelStrategy(DDPStrategy):
    """DDP whose gradient compression works on every backend, not only NCCL."""

    def _register_ddp_hooks(self) -> None:
        if self.root_device.type == "cuda" or self._ddp_comm_hook is None:
            super()._register_ddp_hooks()
        else:
            assert isinstance(self.model, torch.nn.parallel.DistributedDataParallel)
            self.model.register_comm_hook(self._ddp_comm_state, self._ddp_comm_hook)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        # All ranks learn of a full disk; else those that wait for rank 0 would wait for ever.
        on_rank_zero(
            lambda: self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)
        )


class Zero1Strategy(DataParallelStrategy):
    """DDP for a ZeroRedundancyOptimizer, see :func:`flash_attn_train.distributed.distribute_optimizer`.

    Args:
        sharded_checkpoints: every rank writes the optimizer state that it has, into a folder; else rank 0 gathers
            all and writes a file.
        options: of Lightning's DDPStrategy.
    """

    def __init__(self, *, sharded_checkpoints: bool, **options: Any) -> None:
        super().__init__(**options)
        self.sharded_checkpoints = sharded_checkpoints

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        # Nothing is gathered for a folder, which gets the state by name from the optimizer itself.
        return {} if self.sharded_checkpoints else super().optimizer_state(optimizer)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        if not self.sharded_checkpoints:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        assert self.lightning_module is not None
        states = [named_state(optimizer, self.lightning_module) for optimizer in self.optimizers]
        folders.write_checkpoint_folder(Path(filepath), checkpoint, states)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            if isinstance(optimizer, ZeroRedundancyOptimizer):
                # It replaces entries of other ranks by None in the dict that it is given.
                optimizer.load_state_dict({**state, "state": dict(state["state"])})
            else:
                optimizer.load_state_dict(dict(state))


class MeshStrategy(ModelParallelStrategy):
    """FSDP2, tensor parallelism, or both: over a mesh of (data_parallel, tensor_parallel) ranks.

    Args:
        tensor_parallel_size: ranks that share each layer; the rest of the devices is data parallel.
        sharded_checkpoints: every rank writes its part into a folder; else rank 0 gathers all and writes a file.
            Not with tensor parallelism, whose parts no other number of ranks could read.
        options: of Lightning's ModelParallelStrategy.
    """

    def __init__(self, *, tensor_parallel_size: int, sharded_checkpoints: bool, **options: Any) -> None:
        assert tensor_parallel_size == 1 or not sharded_checkpoints
        super().__init__(
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=sharded_checkpoints,
            **options,
        )

    def setup_environment(self) -> None:
        devices, shared = self.num_nodes * self.num_processes, self._tensor_parallel_size
        assert isinstance(shared, int)
        if devices % shared:
            raise ConfigError(
                f"strategy.tensor_parallel_size: got {shared}, expected a divisor of the {devices} devices of the run "
                "(trainer.devices * trainer.num_nodes)."
            )
        self._data_parallel_size = devices // shared  # Lightning's "auto" is one per machine
        super().setup_environment()

    @property
    def _shards(self) -> DeviceMesh | None:
        return tensor_parallel_mesh(self.device_mesh)

    @property
    def _cuts(self) -> Cuts:
        assert self.lightning_module is not None
        return cuts_of(self.lightning_module, self._shards)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        state = self.lightning_module.state_dict()
        if self._save_distributed_checkpoint:
            return state
        whole = {
            name: whole_of(value, self._cuts.get(name), self._shards, keep=self.is_global_zero)
            for name, value in state.items()
        }
        return whole if self.is_global_zero else {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if self._save_distributed_checkpoint:
            return {}  # taken by name when the folder is written
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        assert self.lightning_module is not None
        state, groups = named_state(optimizer, self.lightning_module)
        shapes = {name: parameter.shape for name, parameter in self.lightning_module.named_parameters()}
        whole = {
            name: {
                field: whole_of(
                    value,
                    self._cuts.get(name) if _is_like(value, shapes[name]) else None,
                    self._shards,
                    keep=self.is_global_zero,
                )
                for field, value in values.items()
            }
            for name, values in state.items()
        }
        return numbered_state(whole, groups) if self.is_global_zero else {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        if self._save_distributed_checkpoint:
            assert self.lightning_module is not None
            states = [named_state(optimizer, self.lightning_module) for optimizer in self.optimizers]
            folders.write_checkpoint_folder(Path(filepath), checkpoint, states)
            return
        for key in self._cut_entries(checkpoint):
            checkpoint[key] = {
                name: whole_of(value, self._cuts.get(name), self._shards, keep=self.is_global_zero)
                for name, value in checkpoint[key].items()
            }
        on_rank_zero(
            lambda: self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)
        )

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads weights and optimizer state of any of our checkpoints, and returns what else is in it."""
        path = Path(checkpoint_path)
        if folders.is_checkpoint_folder(path) and self._shards is None:
            return self._load_parts(path)
        checkpoint = self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)
        self._load_whole(path, checkpoint)
        for key in self._cut_entries(checkpoint):
            assert self._shards is not None
            rank, cuts = self._shards.get_local_rank(), self._cuts
            checkpoint[key] = {
                name: cuts[name][0].shard(value, rank, cuts[name][1]) if name in cuts else value
                for name, value in checkpoint[key].items()
            }
        return {
            name: value
            for name, value in checkpoint.items()
            if name not in ("state_dict", "optimizer_states")
        }

    def _load_parts(self, path: Path) -> dict[str, Any]:
        """Every rank reads its part, also if another number of ranks wrote them."""
        assert self.lightning_module is not None

        def verify() -> None:
            try:
                folders.verify_checkpoint_folder(path)
            except (OSError, ValueError) as error:
                raise CheckpointError(
                    f"checkpoint {path} is truncated or damaged: {error}. Nothing was loaded."
                ) from error

        on_rank_zero(verify)
        rest, entries = folders.read_rest(path), folders.entries(path)
        state = self.lightning_module.state_dict()
        self._check_names(path, rest["names"], state)
        targets: dict[str, Any] = {f"model/{name}": value for name, value in state.items()}
        parameters = dict(self.lightning_module.named_parameters())
        loaded: list[dict[str, dict[str, Any]]] = []
        for number, _ in enumerate(self.optimizers):
            loaded.append({})
            prefix = f"optimizer/{number}/"
            for key, entry in entries.items():
                if key.startswith(prefix):
                    name, _, field = key.removeprefix(prefix).rpartition("/")
                    like = parameters[name]
                    value = (
                        torch.zeros_like(like, dtype=entry.properties.dtype, requires_grad=False)
                        if _is_like(torch.empty(entry.size, device="meta"), like.shape)
                        else torch.zeros(entry.size, dtype=entry.properties.dtype)
                    )
                    targets[key] = loaded[-1].setdefault(name, {})[field] = value
            for key, value in rest["others"].items():
                if key.startswith(prefix):
                    name, _, field = key.removeprefix(prefix).rpartition("/")
                    loaded[-1].setdefault(name, {})[field] = value
        folders.load_tensors(path, targets)
        self.lightning_module.load_state_dict(state)
        for optimizer, state_of_one, groups in zip(self.optimizers, loaded, rest["groups"], strict=False):
            renamed_state(
                numbered_state({}, groups), named_state(optimizer, self.lightning_module)[1]
            )  # fits?
            optimizer.load_state_dict(numbered_state(state_of_one, groups))
        return {name: value for name, value in rest.items() if name not in ("names", "groups", "others")}

    def _load_whole(self, path: Path, checkpoint: dict[str, Any]) -> None:
        """Every rank takes its part of what it has read."""
        assert self.lightning_module is not None
        state = self.lightning_module.state_dict()
        self._check_names(path, checkpoint["state_dict"], state)
        parts = {
            name: spread_like(target, checkpoint["state_dict"][name], self._cuts.get(name), self._shards)
            for name, target in state.items()
        }
        self.lightning_module.load_state_dict(parts)
        parameters = dict(self.lightning_module.named_parameters())
        for optimizer, numbered in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            groups = named_state(optimizer, self.lightning_module)[1]
            mine = {
                name: {field: self._part(name, parameters[name], value) for field, value in values.items()}
                for name, values in renamed_state(numbered, groups).items()
            }
            saved = [
                {**group, "params": own["params"]}
                for own, group in zip(groups, numbered["param_groups"], strict=True)
            ]
            optimizer.load_state_dict(numbered_state(mine, saved))

    def _cut_entries(self, checkpoint: dict[str, Any]) -> list[str]:
        """What callbacks have added that has tensors by the names of parameters, such as averaged weights: with tensor
        parallelism each rank's are of its part."""
        cuts = self._cuts
        return [
            key
            for key, entry in checkpoint.items()
            if key != "state_dict" and isinstance(entry, dict) and not cuts.keys().isdisjoint(entry)
        ]

    def _part(self, name: str, parameter: Tensor, value: Any) -> Any:
        cut = self._cuts.get(name)
        shape = list(parameter.shape)
        if cut is not None:
            shape[cut[1]] = cut[0].size
        return spread_like(parameter, value, cut, self._shards) if _is_like(value, shape) else value

    def _check_names(self, path: Path, saved: Any, state: dict[str, Any]) -> None:
        missing, unknown = sorted(state.keys() - set(saved)), sorted(set(saved) - state.keys())
        if missing or unknown:
            raise CheckpointError(
                f"checkpoint {path} is of another model: it lacks {missing or 'nothing'} and has "
                f"{unknown or 'nothing'} besides."
            )


def _is_like(value: Any, shape: Any) -> bool:
    """Whether a value of optimizer state has an entry for each of the parameter's."""
    return isinstance(value, Tensor) and value.dim() > 0 and list(value.shape) == list(shape)
