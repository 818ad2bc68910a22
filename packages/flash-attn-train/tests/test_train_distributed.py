"""Runs of several processes compute what one process computes, and continue each other's checkpoints."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

WORKER = Path(__file__).with_name("distributed_worker.py")
_EPS = torch.finfo(torch.float32).eps


def _load_worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("distributed_worker", WORKER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = _load_worker()


Outcomes = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session")
def outcomes_of(launch: Callable[..., str]) -> Outcomes:
    """Runs a plan, see distributed_worker.py."""

    def run(folder: Path, plan: list[dict[str, Any]], ranks: int | None) -> list[dict[str, Any]]:
        (folder / "plan.json").write_text(json.dumps(plan))
        launch(str(WORKER), str(folder / "plan.json"), ranks=ranks)
        return [json.loads((folder / f"plan-{number}.json").read_text()) for number in range(len(plan))]

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def single(folder: Path) -> dict[str, Any]:
    """Five steps of one process, and a checkpoint of its third."""
    worker.run(strategy="single", folder=str(folder / "single"), steps=3)
    return worker.run(strategy="single", folder=str(folder / "whole"), steps=5)


@pytest.fixture(scope="module")
def exact(folder: Path) -> dict[str, Any]:
    """The same in fp64."""
    return worker.run(strategy="single", folder=str(folder / "exact"), steps=5, precision="64-true")


# Name -> strategy and its options; all on the first three steps.
STARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("ddp", {}),
    "zero1": ("zero1", {}),
    "zero1-sharded": ("zero1", {"sharded_checkpoints": True}),
    "fsdp2": ("fsdp2", {}),
    "fsdp2-consolidated": ("fsdp2", {"sharded_checkpoints": False, "reshard_after_forward": False}),
    "tensor-parallel": ("tensor_parallel", {}),
}
# Name -> strategy, and the run whose checkpoint of step 3 it continues to step 5.
CONTINUATIONS = {
    "single-ddp": ("ddp", "single"),
    "single-zero1": ("zero1", "single"),
    "single-fsdp2": ("fsdp2", "single"),
    "single-tensor-parallel": ("tensor_parallel", "single"),
    "fsdp2-fsdp2": ("fsdp2", "fsdp2"),
    "zero1-sharded-fsdp2": ("fsdp2", "zero1-sharded"),
    "fsdp2-tensor-parallel": ("tensor_parallel", "fsdp2"),
}


@pytest.fixture(scope="module")
def two_ranks(folder: Path, single: dict[str, Any], outcomes_of: Outcomes) -> dict[str, dict[str, Any]]:
    """All runs of two ranks, by name, under one torchrun."""
    plan: dict[str, dict[str, Any]] = {
        name: {"strategy": strategy, "options": options, "steps": 3}
        for name, (strategy, options) in STARTS.items()
    }
    plan["fsdp2-consolidated"]["trainer_options"] = {"activation_checkpointing": "layers"}
    plan["ddp-fp16"] = {"strategy": "ddp", "options": {"compression": "fp16"}, "steps": 2}
    for name, (strategy, start) in CONTINUATIONS.items():
        checkpoint = str(folder / start / "last.ckpt")
        plan[name] = {"strategy": strategy, "steps": 5, "resume": checkpoint}
    plan["warm"] = {
        "strategy": "tensor_parallel",
        "steps": 2,
        "warm_start": str(folder / "single" / "last.ckpt"),
    }
    plan["stopped"] = {"strategy": "ddp", "steps": 50, "mode": "stop"}
    entries = [{"folder": str(folder / name), "devices": 2, **entry} for name, entry in plan.items()]
    return dict(zip(plan, outcomes_of(folder, entries, 2), strict=True))


def assert_same_training(
    outcome: dict[str, Any], single: dict[str, Any], exact: dict[str, Any], steps: slice
) -> None:
    """Losses and gradient norms are as near to those in fp64 as one process's in fp32, up to a factor of two and the
    rounding of a few sums."""
    for name in ("losses", "norms"):
        got, reference, alone = (torch.tensor(run[name]) for run in (outcome, exact, single))
        reference, alone = reference[steps], alone[steps]
        assert got.shape == reference.shape
        bound = 2 * (alone - reference).abs().max() + 8 * _EPS * reference.abs().max()
        assert (got - reference).abs().max() <= bound, (name, got, reference)


@pytest.mark.parametrize("name", STARTS)
def test_two_ranks_train_as_one_process(
    two_ranks: dict[str, Any], single: dict[str, Any], exact: dict[str, Any], name: str
) -> None:
    assert_same_training(two_ranks[name], single, exact, slice(0, 3))


def test_parts_of_the_model(two_ranks: dict[str, Any], single: dict[str, Any]) -> None:
    whole = single["local"]
    assert two_ranks["ddp"]["local"] == [whole, whole]
    for name in ("fsdp2", "fsdp2-consolidated"):
        assert two_ranks[name]["local"] == [whole // 2, whole // 2]
    assert all(whole / 2 < local < 0.52 * whole for local in two_ranks["tensor-parallel"]["local"])


def test_tensor_parallel_ranks_start_from_weights(
    two_ranks: dict[str, Any], single: dict[str, Any], folder: Path
) -> None:
    alone, exact = (
        worker.run(
            strategy="single",
            folder=str(folder / precision),
            steps=2,
            precision=precision,
            warm_start=str(folder / "single" / "last.ckpt"),
        )
        for precision in ("32-true", "64-true")
    )
    assert alone["losses"][0] < 0.99 * single["losses"][0]  # it is not where those began
    assert_same_training(two_ranks["warm"], alone, exact, slice(0, 2))


@pytest.mark.parametrize("name", CONTINUATIONS)
def test_two_ranks_continue(
    two_ranks: dict[str, Any], single: dict[str, Any], exact: dict[str, Any], name: str
) -> None:
    assert_same_training(two_ranks[name], single, exact, slice(3, 5))


@pytest.mark.parametrize("name", STARTS)
def test_one_process_continues_two_ranks(
    two_ranks: dict[str, Any],
    single: dict[str, Any],
    exact: dict[str, Any],
    folder: Path,
    tmp_path: Path,
    name: str,
) -> None:
    checkpoint = str(folder / name / "last.ckpt")
    outcome = worker.run(strategy="single", folder=str(tmp_path), steps=5, resume=checkpoint)
    assert_same_training(outcome, single, exact, slice(3, 5))
    assert outcome["names"] == single["names"]


def test_compressed_gradients(two_ranks: dict[str, Any]) -> None:
    plain, compressed = two_ranks["ddp"], two_ranks["ddp-fp16"]
    assert compressed["losses"][0] == plain["losses"][0]
    assert compressed["norms"][0] != plain["norms"][0]
    # Each gradient is rounded when it is cast, when it is divided and when it is added up.
    assert abs(compressed["norms"][0] - plain["norms"][0]) <= 3 * 2**-11 * plain["norms"][0]


def test_signal_to_one_rank_stops_all_with_a_checkpoint(
    two_ranks: dict[str, Any], single: dict[str, Any], exact: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    stopped = two_ranks["stopped"]
    # It came in step 3, was known to all at the end of it, and heeded at the end of the next.
    assert (stopped["exit"], stopped["step"]) == (128 + 15, 4)
    checkpoint = str(folder / "stopped" / "last.ckpt")
    outcome = worker.run(strategy="single", folder=str(tmp_path), steps=5, resume=checkpoint)
    assert_same_training(outcome, single, exact, slice(4, 5))


def test_decisions_of_rank_zero(two_ranks: dict[str, Any]) -> None:
    seen = {"value": "decided", "error": "only rank 0 looked"}
    assert two_ranks["ddp"]["decided"] == [{**seen, "calls": 1}, {**seen, "calls": 0}]


@pytest.mark.slow
def test_processes_that_lightning_starts(
    outcomes_of: Outcomes, single: dict[str, Any], exact: dict[str, Any], tmp_path: Path
) -> None:
    entry = {"strategy": "ddp", "folder": str(tmp_path), "devices": 2, "steps": 3}
    (outcome,) = outcomes_of(tmp_path, [entry], None)
    assert_same_training(outcome, single, exact, slice(0, 3))
    seen = {"value": "decided", "error": "only rank 0 looked"}
    assert outcome["decided"] == [{**seen, "calls": 1}, {**seen, "calls": 0}]


@pytest.mark.slow
def test_four_ranks(
    two_ranks: dict[str, Any],
    outcomes_of: Outcomes,
    folder: Path,
    single: dict[str, Any],
    exact: dict[str, Any],
    tmp_path: Path,
) -> None:
    """Tensor parallel of 2 with FSDP2 over the others, tensor parallel of 4 where two ranks hold each key/value head,
    and continuations of fewer ranks."""
    plan = [
        {"strategy": "tensor_parallel", "steps": 3},
        {"strategy": "tensor_parallel", "steps": 3, "options": {"sequence_parallel": False}},
        {"strategy": "tensor_parallel", "steps": 3, "options": {"tensor_parallel_size": 4}},
        {"strategy": "tensor_parallel", "steps": 5, "resume": str(folder / "single" / "last.ckpt")},
        {"strategy": "fsdp2", "steps": 5, "resume": str(folder / "fsdp2" / "last.ckpt")},
    ]
    entries = [
        {"folder": str(tmp_path / str(number)), "devices": 4, **entry} for number, entry in enumerate(plan)
    ]
    outcomes = outcomes_of(tmp_path, entries, 4)
    for outcome, entry in zip(outcomes, plan, strict=True):
        assert_same_training(outcome, single, exact, slice(3, 5) if "resume" in entry else slice(0, 3))
    for number in (0, 2):
        checkpoint = str(tmp_path / str(number) / "last.ckpt")
        outcome = worker.run(
            strategy="single", folder=str(tmp_path / f"one{number}"), steps=5, resume=checkpoint
        )
        assert_same_training(outcome, single, exact, slice(3, 5))
