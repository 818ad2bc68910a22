"""Hidden tokens as a pure function of (seed, ordinal), and segments of documents."""

from __future__ import annotations

import numpy as np
import pytest
from flash_attn_train.configs.task import MaskedLMConfig
from flash_attn_train.data.entry import SplitTokens
from flash_attn_train.data.masked_lm import MaskedLMSamples, Masking, Segments
from flash_attn_train.data.permutation import EpochOrder
from flash_attn_train.data.special_tokens import SpecialTokens
from flash_attn_train.data.tokens import Tokens
from flash_attn_train.errors import ConfigError

END, PAD, CLS, SEP, MASK = range(5)
SPECIAL = SpecialTokens(END, PAD, CLS, SEP, MASK, all=(0, 1, 2, 3, 4))
VOCABULARY = 1000


def masking(seed: int = 0, **changes: float) -> Masking:
    return Masking(MaskedLMConfig(**changes), SPECIAL, vocab_size=VOCABULARY, mask=MASK, seed=seed)


def rows(count: int = 200, seqlen: int = 128) -> np.ndarray:
    result = np.random.default_rng(0).integers(5, VOCABULARY, (count, seqlen))
    result[:, 0], result[:, -9], result[:, -8:] = CLS, SEP, PAD
    return result


def test_shares_are_those_of_the_config() -> None:
    ids = rows()
    inputs, labels = masking()(ids, np.arange(len(ids)))
    chosen = labels != -100
    assert (chosen.sum(1) == round(0.15 * (128 - 10))).all()
    assert not chosen[np.isin(ids, SPECIAL.all)].any()
    assert np.array_equal(labels[chosen], ids[chosen])
    assert np.array_equal(inputs[~chosen], ids[~chosen])
    total = chosen.sum()
    masked, kept = (inputs[chosen] == MASK).sum() / total, (inputs[chosen] == ids[chosen]).sum() / total
    assert abs(masked - 0.8) < 5 * (0.8 * 0.2 / total) ** 0.5
    assert abs(kept - 0.1 - 0.1 / 995) < 5 * (0.1 * 0.9 / total) ** 0.5
    replaced = inputs[chosen & (inputs != MASK) & (inputs != ids)]
    assert not np.isin(replaced, SPECIAL.all).any()
    assert len(set(replaced.tolist())) > 200


def test_pure_function_of_seed_and_ordinal() -> None:
    ids = rows(20)
    inputs, labels = masking()(ids, np.arange(100, 120))
    for place in range(20):
        one = masking()(ids[place : place + 1], np.array([100 + place]))
        assert np.array_equal(one[0][0], inputs[place]) and np.array_equal(one[1][0], labels[place])
    for other in (masking(seed=1)(ids, np.arange(100, 120)), masking()(ids, np.arange(200, 220))):
        assert not np.array_equal(other[1], labels)


@pytest.mark.parametrize(
    ("changes", "share_of_masks"),
    [
        ({"keep_probability": 0.0, "random_probability": 0.0}, 1.0),
        ({"keep_probability": 1.0, "random_probability": 0.0}, 0.0),
        ({"keep_probability": 0.0, "random_probability": 1.0}, 0.0),
    ],
)
def test_extreme_probabilities(changes: dict[str, float], share_of_masks: float) -> None:
    inputs, labels = masking(**changes)(rows(), np.arange(200))
    assert (inputs[labels != -100] == MASK).mean() == share_of_masks


def test_a_short_row_has_one_target() -> None:
    _, labels = masking()(np.array([[CLS, 9, SEP, PAD]]), np.array([5]))
    assert labels.tolist() == [[-100, 9, -100, -100]]


def test_probabilities_above_one() -> None:
    with pytest.raises(
        ConfigError, match=r"task\.random_probability: got 0\.6 with task\.keep_probability=0\.5"
    ):
        masking(keep_probability=0.5, random_probability=0.6)


def split(lengths: list[int]) -> SplitTokens:
    """Documents of 10, 11, 12, ... each with an end."""
    parts, first = [], 10
    for length in lengths:
        parts += [np.arange(first, first + length), np.array([END])]
        first += length
    starts = np.cumsum([0, *(length + 1 for length in lengths)]).astype(np.uint64)
    return SplitTokens(Tokens([np.concatenate(parts).astype(np.uint16)]), starts, 0)


def test_segments_are_the_documents_in_even_parts() -> None:
    lengths = [5, 0, 6, 13, 1, 17]
    segments = Segments(split(lengths), 6)
    parts = [segments.read(number) for number in range(len(segments))]
    assert [len(part) for part in parts] == [5, 6, 4, 4, 5, 1, 5, 6, 6]
    assert np.concatenate(parts).tolist() == list(range(10, 10 + sum(lengths)))


def test_batches_are_framed_and_padded() -> None:
    segments = Segments(split([5, 30, 2]), 6)
    samples = MaskedLMSamples(segments, EpochOrder(len(segments), seed=1), masking(), SPECIAL, seqlen=8)
    batch = samples.batch(np.arange(len(samples)))
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "input_ids": (7, 8),
        "attention_mask": (7, 8),
        "labels": (7, 8),
    }
    original = np.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])
    seen = []
    for row, attended in zip(original, batch["attention_mask"].numpy(), strict=True):
        length = int(attended.sum())
        assert attended[:length].all() and row[0] == CLS and row[length - 1] == SEP
        assert (row[length:] == PAD).all()
        seen += row[1 : length - 1].tolist()
    assert sorted(seen) == list(range(10, 47))
    again = samples.batch(np.arange(7, 14))  # the next epoch hides other tokens
    assert not np.array_equal(again["input_ids"], batch["input_ids"])
