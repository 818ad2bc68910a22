"""From text files to batches: corpus -> tokenizer -> token files on disk -> batches as a function of the
step."""

from flash_attn_train.data.corpus import Corpus, Document, read_corpus
from flash_attn_train.data.module import TokenDataModule
from flash_attn_train.data.prepare import PreparedData, prepare_data

__all__ = ["Corpus", "Document", "PreparedData", "TokenDataModule", "prepare_data", "read_corpus"]
