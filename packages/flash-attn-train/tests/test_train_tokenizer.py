"""Tokenizers trained here and pretrained ones, and their special tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from flash_attn_train.data.special_tokens import (
    ENCODER_TOKENS,
    END_OF_TEXT,
    encoder_tokens,
    special_tokens,
)
from flash_attn_train.data.tokenizer import load_tokenizer, pieces, pretrained_tokenizer, train_tokenizer
from flash_attn_train.errors import ConfigError, DataError
from tokenizers import Tokenizer, models, pre_tokenizers, processors


def trained(special: tuple[str, ...] = ()) -> Tokenizer:
    return train_tokenizer(
        ["some text"], vocab_size=270, min_frequency=2, show_progress=False, special=special
    )


def wordpiece(path: Path) -> Path:
    """A tokenizer.json as BERT's, with truncation, padding and added [CLS] and [SEP]."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s"]
    tokenizer = Tokenizer(
        models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(words[:5])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize("special", [(), ENCODER_TOKENS])
@pytest.mark.parametrize(
    "text", ["naïve café 日本 🙂\n\n\t x", "a<|endoftext|>b[MASK] [SEP]", "", "\r\n  \x01"]
)
def test_any_text_decodes_to_itself(text: str, special: tuple[str, ...]) -> None:
    tokenizer = trained(special)
    ids = tokenizer.encode(text).ids
    assert not set(special_tokens(tokenizer).all) & set(ids)
    assert tokenizer.decode(ids) == text


def test_special_tokens_of_a_tokenizer_trained_here() -> None:
    plain, encoder = special_tokens(trained()), special_tokens(trained(ENCODER_TOKENS))
    assert (plain.end_of_text, plain.mask, plain.all) == (0, None, (0,))
    assert encoder.all == (0, 1, 2, 3, 4) and encoder.end_of_text == 0
    assert encoder_tokens(encoder, with_mask=True) == (1, 2, 3, 4)
    with pytest.raises(DataError, match=r"no token \[PAD\] or <pad>; .*tokenizer\.name=bert-base-uncased"):
        encoder_tokens(plain, with_mask=False)


def test_wordpiece(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(wordpiece(tmp_path / "tokenizer.json"))
    special = special_tokens(tokenizer)
    assert special.end_of_text == special.separator == 3
    assert encoder_tokens(special, with_mask=True) == (0, 2, 3, 4)
    assert special.all == (0, 1, 2, 3, 4)
    # Neither cut, nor padded, nor framed.
    assert tokenizer.encode("the cats the cat the", add_special_tokens=False).ids == [5, 6, 7, 5, 6, 5]
    assert load_tokenizer(tmp_path).to_str() == tokenizer.to_str()


def test_end_of_text_by_name(tmp_path: Path) -> None:
    tokenizer = trained()
    assert special_tokens(tokenizer, end_of_text="a").end_of_text == tokenizer.token_to_id("a")
    with pytest.raises(ConfigError, match=r"tokenizer\.end_of_text: got '<nope>', which is not in the voc"):
        special_tokens(tokenizer, end_of_text="<nope>")
    with pytest.raises(DataError, match=r"none of the usual tokens .*tokenizer\.end_of_text=TOKEN"):
        special_tokens(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))


def test_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    for path in (tmp_path / "tokenizer.json", tmp_path / "missing.json"):
        with pytest.raises(DataError, match="not a readable tokenizer file"):
            load_tokenizer(path)


def test_hub_name_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DataError, match=r"tokenizer\.name: cannot load 'no/such' .*tokenizer\.path"):
        pretrained_tokenizer("no/such")


def test_folder_of_transformers_without_tokenizer_json(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="converts the tokenizers of other formats")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    assert transformers.__version__
    tokenizer = pretrained_tokenizer(str(tmp_path))
    assert special_tokens(tokenizer).mask == 4
    assert tokenizer.encode("The cat", add_special_tokens=False).ids == [5, 6]


def test_pieces_are_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flash_attn_train.data.tokenizer._PIECE_CHARACTERS", 10)
    text = "abc\ndef\nghijklmnopqrstuvwxyz\n\nz"
    parts = list(pieces(text))
    assert "".join(parts) == text
    assert max(map(len, parts)) <= 10
    assert parts[0] == "abc\ndef\n"
    assert list(pieces("")) == [""]


def test_end_of_text_is_the_first_token() -> None:
    assert trained().token_to_id(END_OF_TEXT) == 0
