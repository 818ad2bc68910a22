"""Windows, shares and batches as functions of (seed, number)."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from flash_attn_train.data.batches import Batch, TrainBatches, ValidationBatches
from flash_attn_train.data.language_model import LanguageModelSamples
from flash_attn_train.data.permutation import SpreadOrder, permute
from flash_attn_train.data.share import Share
from flash_attn_train.data.tokens import Tokens
from flash_attn_train.data.windows import TrainWindows, ValidationWindows

TOKENS = np.arange(1000, dtype=np.uint16)  # token == position, so that a batch tells where it is from


def windows(tokens: np.ndarray = TOKENS, seqlen: int = 16, seed: int = 0) -> TrainWindows:
    return TrainWindows(Tokens([tokens]), seqlen=seqlen, seed=seed)


def read(source: TrainWindows | ValidationWindows, first: int, count: int) -> np.ndarray:
    return source.read(np.arange(first, first + count))


def test_windows_are_consecutive_tokens() -> None:
    rows = read(windows(), 20, 4)
    assert rows.shape == (4, 17) and rows.dtype == np.int64
    assert np.array_equal(rows - rows[:, :1], np.tile(np.arange(17), (4, 1)))


def test_each_window_of_an_epoch_is_visited_once() -> None:
    source = windows()
    assert len(source) == 61  # of the 62 that fit, one makes room for the offset
    offsets = []
    for epoch in range(4):
        starts = np.sort(read(source, epoch * 61, 61)[:, 0])
        assert np.diff(starts).tolist() == [16] * 60
        assert starts[0] >= 0 and starts[-1] + 16 < len(TOKENS)
        offsets.append(starts[0])
    assert len(set(offsets)) > 1


def test_order_differs_between_epochs_and_seeds() -> None:
    parts = (read(windows(), 0, 61), read(windows(), 61, 61), read(windows(seed=1), 0, 61))
    orders = [((rows[:, 0] - rows[:, 0].min()) // 16).tolist() for rows in parts]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2]) == list(range(61))
    assert len({tuple(order) for order in orders}) == 3
    assert orders[0] != sorted(orders[0])


def test_window_is_a_function_of_seed_and_number() -> None:
    forward, source = read(windows(), 0, 160), windows()
    for number in reversed(range(160)):
        assert np.array_equal(read(source, number, 1)[0], forward[number])


@pytest.mark.parametrize("count", [17, 18, 32, 33, 34, 49])
def test_barely_enough_tokens(count: int) -> None:
    rows = read(windows(TOKENS[:count]), 0, 200)
    assert rows.min() >= 0 and rows.max() < count
    assert np.array_equal(rows - rows[:, :1], np.tile(np.arange(17), (200, 1)))


@pytest.mark.parametrize("sizes", [[1000], [1, 999], [300, 0, 300, 400], [10] * 100])
def test_tokens_in_several_files_are_one_stream(sizes: list[int]) -> None:
    tokens = Tokens(np.split(TOKENS, np.cumsum(sizes)[:-1]))
    assert len(tokens) == 1000 and tokens.dtype == np.uint16
    assert np.array_equal(np.asarray(tokens), TOKENS)
    for start, stop in ((0, 1000), (0, 0), (1000, 1000), (299, 301), (5, 25), (999, 1000)):
        assert np.array_equal(tokens.read(start, stop), TOKENS[start:stop])
    assert np.array_equal(np.asarray(pickle.loads(pickle.dumps(tokens))), TOKENS)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_permute_is_a_permutation(size: int) -> None:
    orders = [permute(np.arange(size), size, key).tolist() for key in range(3)]
    for order in orders:
        assert sorted(order) == list(range(size))
    if size > 10:
        assert len({tuple(order) for order in orders}) == 3


def test_permute_of_a_huge_range() -> None:
    size = 2**40 + 3
    places = permute(np.arange(10_000), size, 7)
    assert places.min() >= 0 and places.max() < size
    assert len(set(places.tolist())) == 10_000
    # 10,000 uniform draws: the mean is within 5 standard errors of the middle.
    assert abs(places.mean() / size - 0.5) < 5 * (1 / 12 / 10_000) ** 0.5


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "world_size"), [(12, 1, 1), (3, 4, 1), (3, 2, 2), (1, 2, 6)]
)
def test_the_samples_of_a_step_do_not_depend_on_who_shares_them(
    batch_size: int, accumulate: int, world_size: int
) -> None:
    ranks = [Share(batch_size, accumulate, rank, world_size, first_sample=24) for rank in range(world_size)]
    assert ranks[0].global_batch == 12
    for step in range(3):
        # Forward pass by forward pass, the ranks' samples are consecutive.
        passes = range(step * accumulate, (step + 1) * accumulate)
        ordinals = [share.ordinals(number) for number in passes for share in ranks]
        assert np.concatenate(ordinals).tolist() == list(range(24 + step * 12, 24 + (step + 1) * 12))


def test_training_batches_are_those_of_the_share() -> None:
    samples = LanguageModelSamples(windows())
    batch = TrainBatches(samples, Share(4, 2, 1, 3, first_sample=48))[3]
    expected = read(windows(), 48 + 24 + 12 + 4, 4)
    assert np.array_equal(batch["input_ids"], expected[:, :-1])
    assert np.array_equal(batch["labels"], expected[:, 1:])
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64


def test_validation_covers_all_windows_once() -> None:
    source = ValidationWindows(Tokens([TOKENS]), seqlen=16)
    assert len(source) == 62
    assert read(source, 0, 62)[:, 0].tolist() == list(range(0, 62 * 16, 16))


def test_validation_spreads_a_limited_number() -> None:
    source = ValidationWindows(Tokens([TOKENS]), seqlen=16, max_windows=4)
    assert read(source, 0, 4)[:, 0].tolist() == [0, 15 * 16, 31 * 16, 46 * 16]
    assert len(ValidationWindows(Tokens([TOKENS]), seqlen=16, max_windows=1000)) == 62
    assert len(SpreadOrder(0, max_items=3)) == 0


def counted(batch: Batch) -> list[int]:
    """First tokens of the rows whose labels count."""
    return batch["input_ids"][(batch["labels"] != -100).all(1), 0].tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 62])
@pytest.mark.parametrize("batch_size", [1, 8, 100])
def test_validation_is_dealt_out_once_in_equal_batches(world_size: int, batch_size: int) -> None:
    samples = LanguageModelSamples(ValidationWindows(Tokens([TOKENS]), seqlen=16))
    ranks = [
        ValidationBatches(samples, batch_size=batch_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert len(ranks[0]) == -(-62 // (batch_size * world_size))
    seen = []
    for batches in ranks:
        for number in range(len(batches)):
            batch = batches[number]
            assert batch["input_ids"].shape == (batch_size, 16)
            # A row counts as a whole or not at all.
            assert ((batch["labels"] == -100).sum(1) % 16 == 0).all()
            assert counted(batch) or batch_size == 1
            seen += counted(batch)
    assert sorted(seen) == list(range(0, 62 * 16, 16))
    with pytest.raises(IndexError):
        ranks[0][len(ranks[0])]
