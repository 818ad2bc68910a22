"""Batches as a function of (seed, number)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flash_attn_train.data import TokenDataModule
from flash_attn_train.data.batches import TrainBatches, ValidationBatches, permute
from torch.utils.data import DataLoader

TOKENS = np.arange(1000, dtype=np.uint16)  # token == position, so that a batch tells where it is from


def batches(
    tokens: np.ndarray = TOKENS, seqlen: int = 16, batch_size: int = 4, seed: int = 0
) -> TrainBatches:
    return TrainBatches(tokens, seqlen=seqlen, batch_size=batch_size, seed=seed)


def test_windows_are_consecutive_tokens() -> None:
    batch = batches()[5]
    assert batch.shape == (4, 17) and batch.dtype == torch.int64
    assert torch.equal(batch - batch[:, :1], torch.arange(17).expand(4, 17))


def test_each_window_of_an_epoch_is_visited_once() -> None:
    source = batches(batch_size=1)
    per_epoch = source.windows_per_epoch
    assert per_epoch == 61  # of the 62 that fit, one makes room for the offset
    offsets = []
    for epoch in range(4):
        starts = sorted(source[epoch * per_epoch + place][0, 0].item() for place in range(per_epoch))
        assert np.diff(starts).tolist() == [16] * (per_epoch - 1)
        assert starts[0] >= 0 and starts[-1] + 16 < len(TOKENS)
        offsets.append(starts[0])
    assert len(set(offsets)) > 1


def test_order_differs_between_epochs_and_seeds() -> None:
    source, other = batches(batch_size=61), batches(batch_size=61, seed=1)
    orders = [((b[:, 0] - b[:, 0].min()) // 16).tolist() for b in (source[0], source[1], other[0])]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2]) == list(range(61))
    assert len({tuple(order) for order in orders}) == 3
    assert orders[0] != sorted(orders[0])


def test_batch_is_a_function_of_seed_and_number() -> None:
    forward = [batches()[number] for number in range(40)]
    source = batches()
    for number in reversed(range(40)):
        assert torch.equal(source[number], forward[number])
    assert not torch.equal(batches(seed=1)[0], forward[0])


def test_batch_size_does_not_change_the_sequence_of_windows() -> None:
    small = torch.cat([batches(batch_size=2)[number] for number in range(60)])
    large = torch.cat([batches(batch_size=8)[number] for number in range(15)])
    assert torch.equal(small, large)


@pytest.mark.parametrize("count", [17, 18, 32, 33, 34, 49])
def test_barely_enough_tokens(count: int) -> None:
    batch = batches(TOKENS[:count], batch_size=200)[0]
    assert batch.min() >= 0 and batch.max() < count
    assert torch.equal(batch - batch[:, :1], torch.arange(17).expand(200, 17))


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


def test_validation_covers_all_windows_once() -> None:
    source = ValidationBatches(TOKENS, seqlen=16, batch_size=8)
    starts = torch.cat([source[number][:, 0] for number in range(len(source))])
    assert starts.tolist() == list(range(0, 62 * 16, 16))
    assert source[len(source) - 1].shape == (62 % 8, 17)
    with pytest.raises(IndexError):
        source[len(source)]


def test_validation_spreads_a_limited_number() -> None:
    source = ValidationBatches(TOKENS, seqlen=16, batch_size=8, max_sequences=4)
    assert source[0][:, 0].tolist() == [0, 15 * 16, 31 * 16, 46 * 16]
    assert len(ValidationBatches(TOKENS, seqlen=16, batch_size=8, max_sequences=1000)) == 8


class FakeTrainer:
    global_step = 5
    accumulate_grad_batches = 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_starts_at_the_trainers_step_and_draws_nothing(num_workers: int) -> None:
    module = TokenDataModule(TOKENS, TOKENS, seqlen=16, batch_size=4, num_workers=num_workers)
    module.trainer = FakeTrainer()  # type: ignore[assignment]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    iterator = iter(module.train_dataloader())
    for number in range(15, 18):
        assert torch.equal(next(iterator), batches()[number])
    loader = module.val_dataloader()
    assert isinstance(loader, DataLoader) and len(list(loader)) == len(module.validation_batches)
    assert torch.equal(torch.get_rng_state(), before)
