"""Which tiles the CUDA kernels choose, walked for devices that this machine need not have."""

from __future__ import annotations

import itertools

import pytest
import torch
from flash_attn_kernels import library

pytestmark = pytest.mark.skipif(
    not library.LIBRARY_PATH.exists(), reason="no compiled library (build it with tools/build_ext.py)"
)

# Shared memory that one block may have: compute capability 8.6, 8.9 and 12.0; 8.0 and 8.7; 9.0 and 10.0.
SHARED_BYTES = {"99 KB": 99 * 1024, "163 KB": 163 * 1024, "227 KB": 227 * 1024}
HEAD_DIMS = [
    (64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256), (1, 1), (8, 256), (256, 8), (65, 64), (97, 33),
    (129, 129), (193, 128), (128, 129),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _loaded() -> None:
    assert library.load_error() is None


def tiles(head_dims: tuple[int, int], general: bool, shared_bytes: int) -> dict[str, tuple[int, ...]]:
    operators = torch.ops.flash_attn_kernels
    return {
        "forward": operators.sm80_forward_tile(*head_dims, general, shared_bytes),
        "backward": operators.sm80_backward_tile(*head_dims, general, False, shared_bytes),
        "backward, large": operators.sm80_backward_tile(*head_dims, general, True, shared_bytes),
    }


@pytest.mark.parametrize("device", SHARED_BYTES)
@pytest.mark.parametrize("general", [False, True])
def test_every_head_dim_has_tiles_that_fit(device: str, general: bool) -> None:
    for head_dims, (kind, tile) in itertools.chain.from_iterable(
        ((d, item) for item in tiles(d, general, SHARED_BYTES[device]).items()) for d in HEAD_DIMS
    ):
        rows, columns, warps, shared_bytes = tile
        assert shared_bytes <= SHARED_BYTES[device], (head_dims, kind)
        assert rows % 16 == 0 and columns % 16 == 0 and warps in (4, 8), (head_dims, kind)


@pytest.mark.parametrize("general", [False, True])
def test_more_shared_memory_never_means_less_of_it_used(general: bool) -> None:
    for head_dims in HEAD_DIMS:
        used = [
            [tile[3] for tile in tiles(head_dims, general, shared_bytes).values()]
            for shared_bytes in SHARED_BYTES.values()
        ]
        assert all(
            a <= b for small, large in itertools.pairwise(used) for a, b in zip(small, large, strict=True)
        )


def test_head_dims_run_in_the_smallest_kernel_that_holds_them() -> None:
    shared_bytes = SHARED_BYTES["227 KB"]
    for smaller, larger in [
        ((40, 64), (64, 64)),
        ((65, 1), (96, 96)),
        ((64, 128), (128, 128)),
        ((129, 100), (192, 128)),
        ((129, 129), (192, 192)),
        ((10, 193), (256, 256)),
    ]:
        assert tiles(smaller, False, shared_bytes) == tiles(larger, False, shared_bytes)


def test_an_unknown_device_with_little_shared_memory_gets_the_smallest_tiles() -> None:
    for head_dims in HEAD_DIMS:
        assert tiles(head_dims, True, 48 * 1024) == tiles(head_dims, True, SHARED_BYTES["99 KB"])
