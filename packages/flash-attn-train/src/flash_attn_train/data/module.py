"""The Lightning data module of every kind of data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from flash_attn_train.configs.schema import TrainConfig
from flash_attn_train.data.batches import CountFrom, Samples, TrainBatches, ValidationBatches
from flash_attn_train.data.share import Share
from flash_attn_train.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class DataFacts:
    """What others want to know of the data.

    Attributes:
        key: equal keys, equal data: a run resumes on data with its key only.
        lines: what a person wants to know before the wait, name -> text.
        tokenizer: of text; None elsewhere.
        end_of_text_id: token that ends a document, and from which a sample starts; None without a tokenizer.
        vocab_size: of the tokenizer; 0 without.
        label_names: of the classes, by class number; empty where there are none.
        prompt: a beginning that suits the text.
        val_bytes_per_token: of the validation text in UTF-8; None where bits per byte mean nothing.
        cache_entry: folder of the cache that has the token files; None where there is none.
    """

    key: str
    lines: dict[str, str]
    tokenizer: Tokenizer | None = None
    end_of_text_id: int | None = None
    vocab_size: int = 0
    label_names: list[str] = field(default_factory=list)
    prompt: str = ""
    val_bytes_per_token: float | None = None
    cache_entry: Path | None = None


class StreamSource(ABC):
    """Training data that can only be read in order."""

    @abstractmethod
    def batches(self, share: Share) -> IterableDataset:
        """A rank's batches, from ``share.first_sample`` on, without end."""


class DataModule(pl.LightningDataModule):
    """Training batches without end, from the trainer's step on, and validation batches; for each rank its own.

    The trainer must be made with ``use_distributed_sampler=False``: the ranks' shares are made here.

    Args:
        train: samples to train on, or a stream of them.
        validation: samples to validate on.
        facts: see there.
        config: of the run.
    """

    def __init__(
        self, train: Samples | StreamSource, validation: Samples, facts: DataFacts, config: TrainConfig
    ) -> None:
        super().__init__()
        self.train_samples, self.validation_samples = train, validation
        self.facts, self.config = facts, config
        self._saved: dict[str, int] = {}

    @property
    def key(self) -> str:
        return self.facts.key

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.facts.tokenizer

    @property
    def end_of_text_id(self) -> int | None:
        return self.facts.end_of_text_id

    @property
    def vocab_size(self) -> int:
        return self.facts.vocab_size

    @property
    def num_classes(self) -> int:
        return len(self.facts.label_names)

    @property
    def label_names(self) -> list[str]:
        return self.facts.label_names

    @property
    def prompt(self) -> str:
        return self.facts.prompt

    @property
    def val_bytes_per_token(self) -> float | None:
        return self.facts.val_bytes_per_token

    def describe(self) -> dict[str, str]:
        """What a person wants to know before the wait: name -> text."""
        return dict(self.facts.lines)

    def train_dataloader(self) -> DataLoader:
        share = self._share()
        self._check_sampler(share)
        self._check_saved(share)
        if isinstance(self.train_samples, StreamSource):
            return self._loader(self.train_samples.batches(share), num_workers=0)
        check_samples("train", len(self.train_samples), share.world_size)
        return self._loader(TrainBatches(self.train_samples, share), sampler=CountFrom(0))

    def val_dataloader(self) -> DataLoader:
        rank, world_size = self._ranks()
        check_samples("validate", len(self.validation_samples), world_size)
        batches = ValidationBatches(
            self.validation_samples,
            batch_size=self.config.trainer.batch_size,
            rank=rank,
            world_size=world_size,
        )
        return self._loader(batches)

    def state_dict(self) -> dict[str, Any]:
        share = self._share()
        return {"global_batch_size": share.global_batch, "world_size": share.world_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = dict(state_dict)

    def _check_sampler(self, share: Share) -> None:
        connector = getattr(self.trainer, "_accelerator_connector", None)
        if share.world_size > 1 and getattr(connector, "use_distributed_sampler", False):
            # Lightning would divide a rank's share among the ranks once more.
            raise TypeError("trainer: expected Trainer(use_distributed_sampler=False) with this data module.")

    def _check_saved(self, share: Share) -> None:
        """What the steps of a checkpoint mean depends on these."""
        got = {"global_batch_size": share.global_batch}
        if isinstance(self.train_samples, StreamSource):
            got["world_size"] = share.world_size
        for name, value in got.items():
            saved = self._saved.get(name, value)
            if saved != value:
                raise CheckpointError(
                    f"the checkpoint is of a run with {name.replace('_', ' ')} {saved}, now it is {value}; its place "
                    f"in the data {'(data.streaming=true) ' if name == 'world_size' else ''}cannot be kept. Continue "
                    "with as many samples per optimizer step (trainer.global_batch_size) and, with data.streaming, "
                    "as many devices."
                )

    def _ranks(self) -> tuple[int, int]:
        """(rank, number) of the processes that see different data; tensor-parallel ones see the same."""
        assert self.trainer is not None
        options = getattr(self.trainer.strategy, "distributed_sampler_kwargs", None) or {}
        return int(options.get("rank", 0)), int(options.get("num_replicas", 1))

    def _share(self) -> Share:
        trainer = self.trainer
        assert trainer is not None
        rank, world_size = self._ranks()
        share = Share(self.config.trainer.batch_size, trainer.accumulate_grad_batches, rank, world_size)
        expected = self.config.trainer.global_batch_size
        if expected is not None and expected != share.global_batch:
            raise ConfigError(
                f"trainer.global_batch_size: got {expected}, expected a multiple of trainer.batch_size * data-parallel "
                f"ranks ({share.batch_size} * {world_size}), in which a step is divided into equal forward passes."
            )
        first = trainer.global_step * share.global_batch
        return Share(share.batch_size, share.accumulate, rank, world_size, first)

    def _loader(self, dataset: Dataset, *, num_workers: int | None = None, **options: Any) -> DataLoader:
        workers = self.config.data.num_workers if num_workers is None else num_workers
        return DataLoader(
            dataset,
            batch_size=None,  # the dataset's items are batches
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            # Without its own generator a loader draws from the global one, and the dropout masks of a run
            # would depend on how often loaders were started.
            generator=torch.Generator().manual_seed(0),
            **options,
        )


def check_samples(purpose: str, count: int, ranks: int) -> None:
    """A forward pass of all ranks takes a sample for each of them; DataError if there are fewer to "train" or to
    "validate" on."""
    if count >= ranks:
        return
    more = {"train": "Use more data", "validate": "Hold out more (data.val_fraction, trainer.val_sequences)"}
    raise DataError(
        f"data: got {count} samples to {purpose} on for {ranks} data-parallel ranks; expected at least one for each. "
        f"{more[purpose]}, or fewer devices."
    )
