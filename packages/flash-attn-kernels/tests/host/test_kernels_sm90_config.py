"""Tiles of the Hopper forward: registers and shared memory that a block of them takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from build_support.instantiations import HEAD_DIMS

KINDS = {"plain": 0, "softcap": 1}
REGISTERS = 64 * 1024  # of a multiprocessor
SHARED_BYTES = 227 * 1024  # that a block may have
WARPGROUP = 128


@pytest.fixture(params=[(d, kind) for d in HEAD_DIMS for kind in KINDS], ids=lambda choice: f"{choice}")
def config(request: pytest.FixtureRequest, host: Callable[..., list[Any]]) -> dict[str, Any]:
    head_dims, kind = request.param
    answer = host([("config", *head_dims, KINDS[kind])])[0]
    assert (answer["head_dim"], answer["head_dim_v"]) == head_dims
    return answer


def test_tiles_are_such_that_the_instructions_take(config: dict[str, Any]) -> None:
    assert config["rows"] == 64 * config["consumers"]  # a product has 64 rows
    assert config["threads"] == WARPGROUP * (config["consumers"] + 1)
    # Named barriers: 1 to 3 are the consumers' turns.
    assert 2 <= config["consumers"] <= 3
    # 16 is the depth of a product; a box of the copy engine has at most 256 rows.
    assert config["columns"] % 16 == 0 and 16 <= config["columns"] <= 256 and config["rows"] <= 256
    assert config["stages"] >= 2 and config["query_stages"] >= 1  # keys are loaded while others are used


def test_registers_are_within_what_a_launch_gives(config: dict[str, Any]) -> None:
    consumers, producer = config["consumers"], config["producer_registers"]
    launched, consumer = config["launch_registers"], config["consumer_registers"]
    assert launched * config["threads"] <= REGISTERS
    assert consumers * consumer + producer <= (consumers + 1) * launched
    assert producer <= launched <= consumer  # who releases and who acquires
    for registers in (producer, launched, consumer):
        assert registers % 8 == 0 and 24 <= registers <= 256
    # A warpgroup's scores and output in fp32, its probabilities in 16 bits, and a few for all the rest.
    words = (config["columns"] + config["head_dim_v"]) * 64 + config["columns"] * 64 // 2
    assert words // WARPGROUP + 24 <= min(consumer, 255)


def test_shared_memory_is_enough_and_aligned(config: dict[str, Any]) -> None:
    assert config["bytes"] <= SHARED_BYTES
    width, width_v = (
        -(-config[name] // 64) * 128 for name in ("head_dim", "head_dim_v")
    )  # bytes, whole panels
    regions = [(address, config["rows"] * width) for address in config["query_tiles"]]
    regions += [(address, config["columns"] * width) for address in config["key_tiles"]]
    regions += [(address, config["columns"] * width_v) for address in config["value_tiles"]]
    assert len(regions) == config["query_stages"] + 2 * config["stages"]
    end = 0
    for address, size in sorted(regions):
        assert address == end and address % 1024 == 0  # the swizzle's period
        end += size
    assert config["storage"] == end
    for name in ("query", "key", "value"):
        assert config[f"{name}_panel_bytes"] % 1024 == 0
    for barrier in config["barriers"]:
        assert barrier % 8 == 0 and config["storage"] <= barrier <= config["bytes"] - 16


@pytest.mark.parametrize(
    ("smaller", "larger"),
    [((8, 8), (64, 64)), ((40, 72), (96, 96)), ((136, 16), (192, 128)), ((136, 256), (256, 256))],
)
def test_head_dims_run_in_the_smallest_kernel_that_holds_them(
    host: Callable[..., list[Any]], smaller: tuple[int, int], larger: tuple[int, int]
) -> None:
    requests = [("config", *d, kind) for d in (smaller, larger) for kind in KINDS.values()]
    answers = host(requests)
    assert answers[: len(KINDS)] == answers[len(KINDS) :]


def test_soft_capping_never_gets_more_keys_than_what_needs_fewer_registers(
    host: Callable[..., list[Any]],
) -> None:
    for head_dims in HEAD_DIMS:
        plain, softcap = host([("config", *head_dims, 0), ("config", *head_dims, 1)])
        assert softcap["columns"] <= plain["columns"]
