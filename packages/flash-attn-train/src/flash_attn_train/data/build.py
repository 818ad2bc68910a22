"""Config -> data module: which data, for which task."""

from __future__ import annotations

import dataclasses
from functools import singledispatch

from flash_attn_train.configs.data import (
    CorpusDataConfig,
    DataConfig,
    HubTextDataConfig,
    LabelledTextDataConfig,
)
from flash_attn_train.configs.schema import TrainConfig
from flash_attn_train.configs.task import (
    LanguageModelConfig,
    MaskedLMConfig,
    SequenceClassificationConfig,
    TaskConfig,
)
from flash_attn_train.data.classification import (
    ClassificationSamples,
    LabelledTokens,
    read_labelled,
    sorted_names,
)
from flash_attn_train.data.describe import describe_prepared
from flash_attn_train.data.language_model import LanguageModelSamples
from flash_attn_train.data.masked_lm import MaskedLMSamples, Masking, Segments
from flash_attn_train.data.module import DataFacts, DataModule
from flash_attn_train.data.open_source import open_source
from flash_attn_train.data.permutation import EpochOrder, Order, SpreadOrder
from flash_attn_train.data.prepare import PreparedData, check_length, prepare_data, tokenizer_of
from flash_attn_train.data.source import TextSource
from flash_attn_train.data.special_tokens import encoder_tokens, special_tokens, vocab_size_of
from flash_attn_train.data.streaming import stream_data
from flash_attn_train.data.windows import TrainWindows, ValidationWindows
from flash_attn_train.errors import ConfigError, DataError

# Seeds of what is drawn for validation, which is the same in every run.
_VALIDATION_SEED = 0


def build_data(config: TrainConfig) -> DataModule:
    """The data module for a (resolved) config: finds the data, prepares them or opens them from the cache.

    All ranks can call this at once; one of a machine prepares and the others wait. Call it before the ranks first
    wait for each other, where a time limit may apply.

    Raises:
        ConfigError: the data are not for the task, or an option is wrong.
        DataError: the data cannot be found, read or cached, or are too few.
    """
    return build_data_module(config.data, config)


@singledispatch
def build_data_module(data: DataConfig, config: TrainConfig) -> DataModule:
    """Dispatches on the class of the data config; other kinds of data register here."""
    raise TypeError(f"data: got {type(data).__name__}, expected a config of the data group.")


@build_data_module.register
def _(data: CorpusDataConfig, config: TrainConfig) -> DataModule:
    if isinstance(data, HubTextDataConfig) and data.streaming:
        if not isinstance(config.task, LanguageModelConfig):
            raise ConfigError(
                f"data.streaming: got true with the task {type(config.task).__name__}, expected a language model; "
                "leave data.streaming out."
            )
        return stream_data(data, config)
    return _corpus_module(config.task, data, config)


@build_data_module.register
def _(data: LabelledTextDataConfig, config: TrainConfig) -> DataModule:
    if not isinstance(config.task, SequenceClassificationConfig):
        raise _wrong_data(data, config.task, "sequence_classification")
    train, validation = read_labelled(data)
    tokenizer = tokenizer_of(config.tokenizer, lambda: iter(train.texts), for_encoder=True)
    special = special_tokens(tokenizer, end_of_text=config.tokenizer.end_of_text)
    encoder_tokens(special, with_mask=False)
    names = sorted_names(train.labels)
    seqlen = context_of(config)
    splits = [LabelledTokens(tokenizer, rows, names, seqlen - 2) for rows in (train, validation)]
    orders: tuple[Order, Order] = (
        EpochOrder(len(train.texts), seed=config.seed),
        SpreadOrder(len(validation.texts), max_items=config.trainer.val_sequences),
    )
    samples = [
        ClassificationSamples(rows, order, special, seqlen=seqlen)
        for rows, order in zip(splits, orders, strict=True)
    ]
    lines = {
        "corpus": f"{data.path}: {len(train.texts):,} texts to train on, {len(validation.texts):,} held out",
        "labels": f"{len(names)}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}",
    }
    facts = DataFacts(
        key="-".join(rows.fingerprint()[:16] for rows in splits),
        lines=lines,
        tokenizer=tokenizer,
        end_of_text_id=special.end_of_text,
        vocab_size=vocab_size_of(tokenizer),
        label_names=names,
    )
    return DataModule(samples[0], samples[1], facts, config)


@singledispatch
def _corpus_module(task: TaskConfig, data: CorpusDataConfig, config: TrainConfig) -> DataModule:
    raise _wrong_data(data, task, "language_model or masked_lm")


@_corpus_module.register
def _(task: LanguageModelConfig, data: CorpusDataConfig, config: TrainConfig) -> DataModule:
    source, prepared = _prepare(data, config, for_encoder=False)
    seqlen = context_of(config)
    check_length(prepared, source.title, seqlen)
    end_of_text = prepared.special.end_of_text if task.documents == "within" else None
    train = TrainWindows(prepared.train, seqlen=seqlen, seed=config.seed)
    validation = ValidationWindows(
        prepared.validation, seqlen=seqlen, max_windows=config.trainer.val_sequences
    )
    return DataModule(
        LanguageModelSamples(train, end_of_text=end_of_text),
        LanguageModelSamples(validation, end_of_text=end_of_text),
        _facts(source, prepared),
        config,
    )


@_corpus_module.register
def _(task: MaskedLMConfig, data: CorpusDataConfig, config: TrainConfig) -> DataModule:
    source, prepared = _prepare(data, config, for_encoder=True)
    seqlen = context_of(config)
    *_, mask = encoder_tokens(prepared.special, with_mask=True)
    samples = []
    for split, seed in (("train", config.seed), ("validation", _VALIDATION_SEED)):
        segments = Segments(prepared.splits[split], seqlen - 2)
        if not len(segments):
            raise DataError(
                f"data.path: the {split} split of {source.title} has no text; expected some. Use more text or "
                "another data.val_fraction."
            )
        order: Order = (
            EpochOrder(len(segments), seed=seed)
            if split == "train"
            else SpreadOrder(len(segments), max_items=config.trainer.val_sequences)
        )
        masking = Masking(task, prepared.special, vocab_size=prepared.vocab_size, mask=mask, seed=seed)
        samples.append(MaskedLMSamples(segments, order, masking, prepared.special, seqlen=seqlen))
    # The loss of hidden tokens is no code length of the text: bits per byte would mean nothing.
    facts = dataclasses.replace(_facts(source, prepared), val_bytes_per_token=None)
    return DataModule(samples[0], samples[1], facts, config)


def context_of(config: TrainConfig) -> int:
    """model.max_seqlen, in tokens.

    Raises:
        ConfigError: the model is not one of text.
    """
    seqlen = getattr(config.model, "max_seqlen", None)
    if seqlen is None:
        raise ConfigError(f"model: got {type(config.model).__name__} with text, expected a model of text.")
    if not isinstance(config.task, LanguageModelConfig) and seqlen < 3:
        raise ConfigError(
            f"model.max_seqlen: got {seqlen}, expected at least 3: a token between the first and the last."
        )
    return int(seqlen)


def _prepare(
    data: CorpusDataConfig, config: TrainConfig, *, for_encoder: bool
) -> tuple[TextSource, PreparedData]:
    source = open_source(data)
    prepared = prepare_data(
        source,
        config.tokenizer,
        cache_dir=data.cache_dir,
        detokenizer=data.detokenizer,
        for_encoder=for_encoder,
    )
    return source, prepared


def _facts(source: TextSource, prepared: PreparedData) -> DataFacts:
    return DataFacts(
        key=prepared.key,
        lines=describe_prepared(source, prepared),
        tokenizer=prepared.tokenizer,
        end_of_text_id=prepared.special.end_of_text,
        vocab_size=prepared.vocab_size,
        prompt=source.prompt,
        val_bytes_per_token=prepared.splits["validation"].num_bytes / max(1, len(prepared.validation)),
        cache_entry=prepared.tokenizer_file.parent,
    )


def _wrong_data(data: DataConfig, task: TaskConfig, expected: str) -> ConfigError:
    return ConfigError(
        f"data: got {type(data).__name__} for the task {type(task).__name__}; these data are for {expected}. Choose "
        "other data or another task."
    )
