"""Options of the data group: what is trained on; and of the tokenizer section."""

# No `from __future__ import annotations` here: OmegaConf reads the annotations as types.

from dataclasses import dataclass

from flash_attn_train.configs.option import option, unless, where


@dataclass
class DataConfig:
    """What every kind of data has."""

    cache_dir: str | None = option(
        None,
        "where prepared data are kept; null: flash-attn-train in the user's cache folder",
        where("data", "text", "hub_text"),
    )
    num_workers: int = option(
        0, "processes that assemble batches; 0: the training process itself", at_least=0
    )


@dataclass
class CorpusDataConfig(DataConfig):
    """Text of any source, for the tasks that need nothing but text."""

    val_fraction: float = option(
        0.05,
        "share of the documents held out for validation",
        where("data.val_split", None),
        above=0.0,
        below=1.0,
    )
    text_field: str = option("text", "field of a record (JSONL, Parquet, CSV, TSV, hub) that has the text")
    detokenizer: str = option(
        "none",
        "undo what a corpus's makers did to its text, such as ' ,' for ','",
        choices=("none", "wikitext", "ptb", "lm1b", "lambada"),
    )


@dataclass
class TextDataConfig(CorpusDataConfig):
    """Text on this machine: plain files are a document each; JSONL (also .gz, .zst), Parquet, CSV and TSV one per
    row."""

    path: str | None = option(
        None, "file, or folder read recursively; null: the source of Python's standard library"
    )
    suffixes: list[str] = option(
        [],
        "in a folder, read only names with these endings, e.g. [.txt,.md]; []: all text",
        unless("data.path", equal=None),
    )


@dataclass
class HubTextDataConfig(CorpusDataConfig):
    """Text of a Hugging Face dataset: on the hub, or in a folder. Needs flash-attn-train[data]."""

    name: str = option("", "dataset on the hub, OWNER/NAME, or a folder with one")
    config_name: str | None = option(None, "configuration of the dataset, where it has several")
    revision: str | None = option(None, "commit, tag or branch on the hub; null: the newest")
    split: str = option("train", "split to train on")
    val_split: str | None = option(
        None, "split to validate on; null: documents of data.split, held out by the hash of their text"
    )
    rows: str = option(
        "documents",
        "what a row is: a document; or a line, of documents that begin at a title as in wikitext",
        choices=("documents", "lines"),
    )
    streaming: bool = option(
        False,
        "tokenise while training, in the source's order, and keep nothing on disk; with num_workers above 0, in a "
        "thread that stays ahead",
    )


@dataclass
class LabelledTextDataConfig(DataConfig):
    """Texts with a label each, in a JSONL, Parquet, CSV or TSV file, for sequence classification."""

    path: str = option("", "file with a text and a label per row")
    val_path: str | None = option(None, "such a file to validate on; null: rows held out of data.path")
    text_field: str = option("text", "field with the text")
    label_field: str = option("label", "field with the label, a text or a whole number")
    val_fraction: float = option(
        0.1,
        "share of the rows held out for validation, by the hash of the text",
        where("data.val_path", None),
        above=0.0,
        below=1.0,
    )


_TRAINED_HERE = (where("tokenizer.name", None), where("tokenizer.path", None))


@dataclass
class TokenizerConfig:
    """A pretrained tokenizer (name or path), or a byte-level BPE trained on the training split."""

    name: str | None = option(
        None, "tokenizer on the Hugging Face hub, such as gpt2; null: path, or train one"
    )
    path: str | None = option(
        None, "tokenizer.json of the tokenizers library, or a folder with one; null: name, or train one"
    )
    end_of_text: str | None = option(
        None, "token that ends a document; null: the usual ones are looked for, <|endoftext|> first"
    )
    vocab_size: int = option(
        4096,
        "of a tokenizer trained here: largest vocabulary, special tokens included",
        *_TRAINED_HERE,
        at_least=257,
        at_most=2**31 - 1,
    )
    min_frequency: int = option(
        2, "of a tokenizer trained here: pairs seen less often are never merged", *_TRAINED_HERE, at_least=1
    )
    train_characters: int = option(
        1_000_000_000,
        "of a tokenizer trained here: trained on the first documents, up to so many characters",
        *_TRAINED_HERE,
        at_least=1,
    )


# Config group `data`: name on the command line -> schema.
DATA: dict[str, type[DataConfig]] = {
    "text": TextDataConfig,
    "hub_text": HubTextDataConfig,
    "labelled_text": LabelledTextDataConfig,
}
