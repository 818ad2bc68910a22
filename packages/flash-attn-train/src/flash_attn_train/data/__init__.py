"""From data on disk or on a hub to batches as a function of the step."""

from flash_attn_train.data.build import build_data, build_data_module
from flash_attn_train.data.corpus import Corpus, Document, read_corpus
from flash_attn_train.data.images import build as _images  # noqa: F401 - registers images with build_data_module
from flash_attn_train.data.module import DataFacts, DataModule
from flash_attn_train.data.prepare import PreparedData, prepare_data

__all__ = [
    "Corpus",
    "DataFacts",
    "DataModule",
    "Document",
    "PreparedData",
    "build_data",
    "build_data_module",
    "prepare_data",
    "read_corpus",
]
