"""Windows of consecutive tokens, as functions of their number: nothing to save and nothing to fast-forward when a
run resumes."""

from __future__ import annotations

import numpy as np

from flash_attn_train.data.permutation import EpochOrder, SpreadOrder, derive_key, mix
from flash_attn_train.data.tokens import Tokens


class TrainWindows:
    """Window number i, i = 0, 1, 2, ...: ``seqlen`` + 1 tokens, of which the last is a target only.

    Epoch by epoch, the tokens are cut into windows of ``seqlen`` (each with one more token as last target),
    from an offset that differs by epoch, and visited in an order that differs by epoch, each window once.
    Offset and order are pure functions of (seed, epoch), so window i is a pure function of (seed, i).

    Args:
        tokens: (n,), n > seqlen.
    """

    def __init__(self, tokens: Tokens, *, seqlen: int, seed: int) -> None:
        self.tokens, self.seqlen, self.seed = tokens, seqlen, seed
        # One window less than would fit leaves room to move the offset; with a single window there is none to
        # spare.
        self.order = EpochOrder(max(1, (len(tokens) - 1) // seqlen - 1), seed=seed)
        self._slack = len(tokens) - 1 - len(self) * seqlen

    def __len__(self) -> int:
        """Windows per epoch."""
        return self.order.size

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """(n,) whole numbers >= 0 -> (n, seqlen + 1) int64."""
        starts = self.seqlen * self.order(numbers)
        epochs = numbers // len(self)
        for epoch in np.unique(epochs):
            key = derive_key(self.seed, epoch, 0)
            starts[epochs == epoch] += int(mix(np.array([0], np.uint64), key)[0] % np.uint64(self._slack + 1))
        return self.tokens.windows(starts, self.seqlen + 1)


class ValidationWindows:
    """Consecutive windows of the held-out tokens: all of them, or ``max_windows`` spread evenly over them."""

    def __init__(self, tokens: Tokens, *, seqlen: int, max_windows: int | None = None) -> None:
        self.tokens, self.seqlen = tokens, seqlen
        self.order = SpreadOrder((len(tokens) - 1) // seqlen, max_items=max_windows)

    def __len__(self) -> int:
        return len(self.order)

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """(n,) whole numbers in [0, len) -> (n, seqlen + 1) int64."""
        return self.tokens.windows(self.seqlen * self.order(numbers), self.seqlen + 1)
