"""Hugging Face datasets, in folders on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from flash_attn_train.configs import TrainConfig
from flash_attn_train.configs.data import HubTextDataConfig, TokenizerConfig
from flash_attn_train.data import build_data, prepare_data
from flash_attn_train.data.hub import HubCorpus, documents
from flash_attn_train.errors import ConfigError, DataError

datasets = pytest.importorskip("datasets", reason="the datasets library reads Hugging Face datasets")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def write_dataset(folder: Path, *, field: str = "text") -> Path:
    folder.mkdir()
    for split, count in (("train", 200), ("validation", 20)):
        rows = [{"id": number, field: f"{split} text {number}"} for number in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_documents_are_held_out_by_their_text(tmp_path: Path) -> None:
    config = HubTextDataConfig(name=str(write_dataset(tmp_path / "data")), val_fraction=0.2)
    source = HubCorpus(config)
    train, validation = (list(source.texts(split)) for split in ("train", "validation"))
    assert sorted(train + validation) == sorted(f"train text {number}" for number in range(200))
    assert 20 < len(validation) < 60
    assert source.num_texts("train") == 160 and source.num_texts("validation") == 40
    assert source.fingerprint() == HubCorpus(config).fingerprint()


def test_split_of_the_dataset(tmp_path: Path) -> None:
    name = str(write_dataset(tmp_path / "data"))
    source = HubCorpus(HubTextDataConfig(name=name, val_split="validation"))
    assert list(source.texts("train")) == [f"train text {number}" for number in range(200)]
    assert list(source.texts("validation")) == [f"validation text {number}" for number in range(20)]
    assert source.num_texts("validation") == 20
    other = HubCorpus(HubTextDataConfig(name=name))
    assert source.fingerprint() != other.fingerprint()


def test_what_is_prepared_needs_no_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_dataset(tmp_path / "data")
    config = HubTextDataConfig(name=str(folder), val_fraction=0.2)
    options = {"seqlen": 16, "cache_dir": str(tmp_path / "cache")}
    first = prepare_data(HubCorpus(config), TokenizerConfig(vocab_size=270), **options)  # type: ignore[arg-type]
    monkeypatch.setattr("flash_attn_train.data.hub.load_split", None)  # would fail if called
    again = prepare_data(HubCorpus(config), TokenizerConfig(vocab_size=270), **options)  # type: ignore[arg-type]
    assert again.from_cache and again.key == first.key
    with open(folder / "train.jsonl", "a") as file:
        file.write('{"id": 200, "text": "one more"}\n')
    assert HubCorpus(config).fingerprint() != HubCorpus(HubTextDataConfig(name="other")).fingerprint()
    with pytest.raises(TypeError):  # changed, so it is read again
        prepare_data(HubCorpus(config), TokenizerConfig(vocab_size=270), **options)  # type: ignore[arg-type]


def test_a_cache_inside_the_folder_of_a_dataset(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data")
    config = HubTextDataConfig(name=str(folder), val_fraction=0.2, cache_dir=str(folder / "cache"))
    for from_cache in (False, True):
        data = prepare_data(HubCorpus(config), TokenizerConfig(vocab_size=270), cache_dir=config.cache_dir)
        assert data.from_cache == from_cache


def test_dataset_saved_to_disk(tmp_path: Path) -> None:
    data = datasets.DatasetDict({"train": datasets.Dataset.from_list([{"text": f"t{n}"} for n in range(30)])})
    data.save_to_disk(tmp_path / "saved")
    source = HubCorpus(HubTextDataConfig(name=str(tmp_path / "saved"), val_fraction=0.5))
    assert len(list(source.texts("train"))) + len(list(source.texts("validation"))) == 30


def test_lines_are_joined_to_documents() -> None:
    rows = ["", " = One = \n", "", " Text , more . \n", " = = Part = = \n", " x \n", " = Two = \n", " y"]
    assert list(documents(rows, "lines")) == [
        " = One = \n\n Text , more . \n = = Part = = \n x \n",
        " = Two = \n y\n",
    ]
    assert list(documents(["a", " ", "b"], "documents")) == ["a", "b"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"name": "no-such-folder-or-dataset/x"},
            r"data\.name: cannot load split 'train'.*a folder with a copy",
        ),
        ({"split": "nope"}, r"data\.name: cannot load split 'nope'"),
        ({"text_field": "body"}, r"data\.text_field: .* has no field 'body'; it has id, text"),
    ],
)
def test_errors(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    name = str(write_dataset(tmp_path / "data"))
    source = HubCorpus(HubTextDataConfig(**{"name": name, **changes}))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=message):
        next(source.texts("train"))


def test_blank_lines_are_part_of_a_document_of_lines(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    lines = [" = One = \n", "", " Text . \n", None, "", " = Two = \n", "", " More . \n"]
    (tmp_path / "data/train.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    source = HubCorpus(HubTextDataConfig(name=str(tmp_path / "data"), rows="lines", val_fraction=1e-9))
    assert list(source.texts("train")) == [" = One = \n\n Text . \n\n", " = Two = \n\n More . \n"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_field_that_is_not_text(tmp_path: Path, streaming: bool) -> None:
    data = HubTextDataConfig(
        name=str(write_dataset(tmp_path / "data")),
        text_field="id",
        streaming=streaming,
        cache_dir=str(tmp_path),
    )
    with pytest.raises(DataError, match=r"field 'id' has a int, expected a text\. Set data\.text_field"):
        build_data(TrainConfig(data=data))


def test_name_is_needed() -> None:
    with pytest.raises(ConfigError, match=r"data\.name: got ''"):
        HubCorpus(HubTextDataConfig())
