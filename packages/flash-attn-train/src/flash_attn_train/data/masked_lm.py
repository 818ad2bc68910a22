"""Samples for the prediction of hidden tokens: parts of documents, with tokens hidden."""

from __future__ import annotations

import numpy as np
import torch

from flash_attn_train.configs.task import MaskedLMConfig
from flash_attn_train.data.batches import Batch
from flash_attn_train.data.entry import SplitTokens
from flash_attn_train.data.permutation import Order, derive_key, mix
from flash_attn_train.data.special_tokens import SpecialTokens, encoder_tokens
from flash_attn_train.errors import ConfigError


class Segments:
    """Documents cut into parts of nearly equal length, as few as fit into ``length`` tokens each. No part spans two
    documents; the end-of-text token is left out."""

    def __init__(self, split: SplitTokens, length: int) -> None:
        self.tokens, self.starts = split.tokens, split.starts
        lengths = np.diff(split.starts.astype(np.int64)) - 1
        self.ends = np.cumsum(-(-lengths // length))

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, number: int) -> np.ndarray:
        """Segment ``number`` in [0, len): (at most length,) unsigned integers."""
        document = int(np.searchsorted(self.ends, number, side="right"))
        first = int(self.ends[document - 1]) if document else 0
        parts, part = int(self.ends[document]) - first, number - first
        start = int(self.starts[document])
        length = int(self.starts[document + 1]) - 1 - start
        return self.tokens.read(start + part * length // parts, start + (part + 1) * length // parts)


class Masking:
    """Hides tokens (Devlin et al. 2018, arXiv:1810.04805, section 3.1) as a pure function of (seed, ordinal).

    Of the tokens of a row that are not special, the share ``mask_probability`` is to be predicted, to the nearest
    whole number and at least one. Each of these stays, becomes a random ordinary token, or becomes the mask token,
    with the probabilities of the config.

    Raises:
        ConfigError: the probabilities add up to more than 1.
    """

    def __init__(
        self, config: MaskedLMConfig, special: SpecialTokens, *, vocab_size: int, mask: int, seed: int
    ) -> None:
        if config.keep_probability + config.random_probability > 1:
            raise ConfigError(
                f"task.random_probability: got {config.random_probability} with task.keep_probability="
                f"{config.keep_probability}, expected a sum of at most 1."
            )
        self.config, self.mask = config, mask
        self.special = np.array(special.all, np.int64)
        self.ordinary = np.setdiff1d(np.arange(vocab_size), self.special)
        self.keys = [derive_key(seed, purpose) for purpose in range(3)]

    def __call__(self, rows: np.ndarray, ordinals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (n, S) int64 and sample ordinals (n,) -> inputs and labels, (n, S) int64; labels are -100 where
        nothing is to be predicted."""
        places = ordinals.astype(np.uint64)[:, None] * np.uint64(rows.shape[1])
        places = places + np.arange(rows.shape[1], dtype=np.uint64)
        allowed = ~np.isin(rows, self.special)
        counts = allowed.sum(1)
        counts = np.minimum(counts, np.maximum(1, np.floor(self.config.mask_probability * counts + 0.5)))

        draw = mix(places, self.keys[0])
        draw[~allowed] = np.iinfo(np.uint64).max
        rank = np.argsort(np.argsort(draw, axis=1, kind="stable"), axis=1, kind="stable")
        chosen = (rank < counts[:, None]) & allowed

        fate = mix(places, self.keys[1]) / 2.0**64
        random = self.ordinary[(mix(places, self.keys[2]) % np.uint64(len(self.ordinary))).astype(np.int64)]
        keep, replace = self.config.keep_probability, self.config.random_probability
        hidden = np.where(fate < keep, rows, np.where(fate < keep + replace, random, self.mask))
        return np.where(chosen, hidden, rows), np.where(chosen, rows, -100)


class MaskedLMSamples:
    """``input_ids`` and ``labels`` (n, S) int64 and ``attention_mask`` (n, S) bool, False at padding: [CLS], a segment,
    [SEP], padding.

    Args:
        segments: of at most seqlen - 2 tokens.
        order: sample number -> segment.
        masking: hides tokens by sample number, so a segment has other tokens hidden in each epoch.
        seqlen: S.
    """

    def __init__(
        self,
        segments: Segments,
        order: Order,
        masking: Masking,
        special: SpecialTokens,
        *,
        seqlen: int,
    ) -> None:
        self.segments, self.order, self.masking = segments, order, masking
        self.seqlen = seqlen
        self.pad, self.begin, self.separator, _ = encoder_tokens(special, with_mask=True)

    def __len__(self) -> int:
        return len(self.order)

    def batch(self, numbers: np.ndarray) -> Batch:
        parts = [self.segments.read(item) for item in self.order(numbers).tolist()]
        rows, attended = pad_rows(parts, self.seqlen, self.pad, self.begin, self.separator)
        inputs, labels = self.masking(rows, numbers)
        return {
            "input_ids": torch.from_numpy(inputs),
            "attention_mask": torch.from_numpy(attended),
            "labels": torch.from_numpy(labels),
        }


def pad_rows(
    parts: list[np.ndarray], seqlen: int, pad: int, begin: int, separator: int
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, at most seqlen - 2 each -> rows (n, seqlen) int64 of begin, ids, separator and padding, and where
    there is no padding, (n, seqlen) bool."""
    rows = np.full((len(parts), seqlen), pad, np.int64)
    rows[:, 0] = begin
    lengths = np.array([len(part) for part in parts], np.int64)
    for row, part in zip(rows, parts, strict=True):
        row[1 : len(part) + 1] = part
    rows[np.arange(len(parts)), lengths + 1] = separator
    return rows, np.arange(seqlen) < (lengths + 2)[:, None]
