"""Random streams that ranks share, or do not share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .group import GroupLike, resolve_group


class RngStream:
    """A stream of random numbers beside torch's own, for dropout in tensor-parallel models.

    A tensor that all ranks hold alike must be dropped alike, or the ranks drift apart without any error; shards (of
    heads, hidden features or tokens) must be dropped independently, or the masks repeat. Make one stream of each
    kind, seeded alike on all ranks, and use ``with stream.active():`` around the dropout::

        replicated = RngStream(seed, group, same_on_all_ranks=True)
        sharded = RngStream(seed, group, same_on_all_ranks=False)

    Args:
        seed: the same on all ranks.
        group: the ranks.
        same_on_all_ranks: whether all ranks draw the same numbers.

    Inside, torch's generators of the CPU and of the current GPU continue the stream; afterwards they are as before.
    Eager only: torch.compile breaks its graph here.
    """

    def __init__(self, seed: int, group: GroupLike = None, *, same_on_all_ranks: bool) -> None:
        # Seeds of streams: 0 is the shared one, 1 + rank the others, so that none of them meet.
        stream = 0 if same_on_all_ranks else 1 + resolve_group(group).rank
        self.seed = (seed * 1_000_003 + stream) % 2**63
        self._states: dict[str, torch.Tensor] = {}

    @contextmanager
    def active(self) -> Iterator[None]:
        """torch's generators draw from this stream."""
        on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
        gpu = torch.cuda.current_device() if on_gpu else None
        with torch.random.fork_rng([] if gpu is None else [gpu]):
            self._enter("cpu", torch.default_generator)
            if gpu is not None:
                self._enter(f"cuda:{gpu}", torch.cuda.default_generators[gpu])
            try:
                yield
            finally:
                self._states["cpu"] = torch.default_generator.get_state()
                if gpu is not None:
                    self._states[f"cuda:{gpu}"] = torch.cuda.default_generators[gpu].get_state()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The positions in the stream, for a checkpoint."""
        return dict(self._states)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        self._states = dict(state)

    def _enter(self, device: str, generator: torch.Generator) -> None:
        if device in self._states:
            generator.set_state(self._states[device])
        else:
            generator.manual_seed(self.seed)
