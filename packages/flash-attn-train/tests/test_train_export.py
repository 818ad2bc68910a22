"""Trained models in Hugging Face layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flash_attn_models import load_pretrained
from flash_attn_train.checkpoints import read_checkpoint
from flash_attn_train.cli import compose_config
from flash_attn_train.configs import (
    BertModelConfig,
    CallbacksConfig,
    GPTModelConfig,
    HuggingFaceModelConfig,
    MaskedLMConfig,
    TrainConfig,
)
from flash_attn_train.configs.callbacks import EMAConfig
from flash_attn_train.errors import CheckpointError, ConfigError, OutputError
from flash_attn_train.export import export, main
from flash_attn_train.restore import restore
from flash_attn_train.run import train

SHAPE = {"max_seqlen": 16, "n_layer": 2, "n_head": 2, "d_model": 32, "dropout": 0.0}


@pytest.fixture
def transformers() -> Any:
    return pytest.importorskip("transformers", reason="loads the exported folder")


def model_named(name: str, **fields: Any) -> GPTModelConfig:
    model = compose_config(["experiment=none", f"model={name}"]).model
    assert isinstance(model, GPTModelConfig)
    for key, value in {**SHAPE, "d_inner": None, **fields}.items():
        setattr(model, key, value)
    return model


@pytest.mark.parametrize("name", ["gpt2-small", "llama"])
def test_transformers_loads_the_model_and_its_tokenizer(
    small_config: Callable[..., TrainConfig], tmp_path: Path, transformers: Any, name: str
) -> None:
    run = train(small_config(model=model_named(name), optimizer={"lr": 1e-2}))
    folder = export(str(run.folder), tmp_path / "hf")
    assert {file.name for file in folder.iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    }
    ours = restore(str(run.folder)).model
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the cat sees the dog", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids), rtol=1e-4, atol=1e-5)
    assert tokenizer.decode(ids[0]) == "the cat sees the dog"
    assert tokenizer.eos_token == "<|endoftext|>" and theirs.config.eos_token_id == tokenizer.eos_token_id

    # Bit for bit: read by us, and read and written by transformers.
    theirs.save_pretrained(tmp_path / "again")
    for again in (load_pretrained(folder), load_pretrained(tmp_path / "again")):
        states = ours.state_dict(), again.state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        with torch.no_grad():
            assert torch.equal(again(ids), ours(ids))


def test_averaged_weights_and_dtype(small_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    callbacks = CallbacksConfig(ema=EMAConfig(enabled=True, decay=0.5))
    run = train(small_config(callbacks=callbacks, optimizer={"lr": 1e-2}))
    averaged = load_pretrained(export(str(run.folder), tmp_path / "averaged")).state_dict()
    trained = load_pretrained(export(str(run.folder), tmp_path / "trained", use_ema=False)).state_dict()
    assert any(not torch.equal(averaged[name], trained[name]) for name in averaged)
    small = load_pretrained(export(str(run.folder), tmp_path / "bf16", dtype=torch.bfloat16)).state_dict()
    assert all(torch.equal(small[name], averaged[name].bfloat16()) for name in averaged)


def test_a_model_of_transformers(
    small_config: Callable[..., TrainConfig], tmp_path: Path, transformers: Any
) -> None:
    """Its embedding is its head too, of which a checkpoint has two entries, and the average one."""
    model = HuggingFaceModelConfig(max_seqlen=16, config={"n_layer": 1, "n_head": 2, "n_embd": 16})
    callbacks = CallbacksConfig(ema=EMAConfig(enabled=True, decay=0.5))
    run = train(small_config(model=model, callbacks=callbacks, optimizer={"lr": 1e-2}))
    folder = export(str(run.folder), tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    averages = read_checkpoint(run.last_checkpoint)["ema_state_dict"]
    for name, parameter in theirs.named_parameters():
        assert torch.equal(parameter, averages[f"model.{name}"]), name
    assert theirs.lm_head.weight is theirs.transformer.wte.weight
    assert theirs.config.eos_token_id == transformers.AutoTokenizer.from_pretrained(folder).eos_token_id


def test_bert(small_config: Callable[..., TrainConfig], tmp_path: Path, transformers: Any) -> None:
    model = BertModelConfig(max_seqlen=16, n_layer=1, n_head=2, d_model=32)
    run = train(small_config(model=model, task=MaskedLMConfig()))
    folder = export(str(run.folder), tmp_path / "hf")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        expected = restore(str(run.folder)).model(ids, torch.ones_like(ids)).logits
        torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(folder).mask_token == "[MASK]"


def test_bert_with_classes(tmp_path: Path, transformers: Any) -> None:
    rows = [
        {"text": f"{word} {number}", "label": word} for number in range(40) for word in ("good", "bad", "new")
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = compose_config(
        [
            *("experiment=none", "task=sequence_classification", "model=bert", "data=labelled_text"),
            *("model.max_seqlen=16", "model.n_layer=1", "model.n_head=2", "model.d_model=32"),
            *(f"data.path={tmp_path / 'rows.jsonl'}", "data.val_fraction=0.3", "tokenizer.vocab_size=300"),
            *("trainer.max_steps=2", "trainer.val_every_n_steps=2", "checkpoint.every_n_steps=2"),
            *("logger.tensorboard=false", "scheduler.decay_steps=2", f"output_dir={tmp_path / 'run'}"),
        ]
    )
    run = train(config)
    folder = export(str(run.folder), tmp_path / "hf")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        expected = restore(str(run.folder)).model(ids, torch.ones_like(ids))
        torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert theirs.config.id2label == {0: "bad", 1: "good", 2: "new"}
    assert theirs.config.label2id == {"bad": 0, "good": 1, "new": 2}
    # A checkpoint keeps the names where it is without its folder.
    moved = tmp_path / "moved.ckpt"
    run.last_checkpoint.rename(moved)
    folder = export(str(moved), tmp_path / "named", tokenizer=run.folder / "tokenizer.json")
    assert json.loads((folder / "config.json").read_text())["id2label"]["2"] == "new"
    # One that was written without them has those of its folder, or none.
    checkpoint = read_checkpoint(moved)
    del checkpoint["label_names"]
    torch.save(checkpoint, run.last_checkpoint)
    assert restore(str(run.folder)).label_names == ["bad", "good", "new"]
    (run.folder / "labels.json").unlink()
    folder = export(str(run.folder), tmp_path / "unnamed")
    assert json.loads((folder / "config.json").read_text())["id2label"]["2"] == "LABEL_2"


def test_vision_transformer(tmp_path: Path, transformers: Any) -> None:
    pytest.importorskip("sklearn", reason="has the digits: pip install flash-attn-train[images]")
    overrides = ["trainer.max_steps=2", "trainer.val_every_n_steps=2", "checkpoint.every_n_steps=2"]
    run = train(compose_config(["experiment=digits", *overrides, f"output_dir={tmp_path / 'run'}"]))
    folder = export(str(run.folder), tmp_path / "hf")
    assert not (folder / "tokenizer.json").exists()
    theirs = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    assert theirs.config.id2label == {number: str(number) for number in range(10)}
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        expected = restore(str(run.folder)).model(images).logits
        torch.testing.assert_close(theirs(images).logits, expected, rtol=1e-4, atol=1e-5)


def test_refuses_before_it_writes(
    small_config: Callable[..., TrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(small_config(model={"position": "alibi", "activation": "swiglu", "norm": "rms_norm"}))
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    with pytest.raises(OutputError, match="holds something already"):
        export(str(run.folder), full)
    with pytest.raises(CheckpointError, match="expected a run folder"):
        export("gpt2", tmp_path / "new")
    with pytest.raises(ConfigError, match="cannot be written in Hugging Face layout"):
        export(str(run.folder), tmp_path / "new")
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".new*"))
    assert main([str(run.folder), str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err.startswith("flash-attn-export: error: model: ")


def test_command(
    small_config: Callable[..., TrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(small_config())
    (run.folder / "tokenizer.json").rename(tmp_path / "mine.json")
    place = tmp_path / "deep" / "hf"
    place.mkdir(parents=True)
    assert main([str(run.best_checkpoint), str(place), "--tokenizer", str(tmp_path / "mine.json")]) == 0
    printed = capsys.readouterr().out
    assert "model.safetensors" in printed and "no tokenizer" not in printed
    assert (place / "tokenizer.json").read_bytes() == (tmp_path / "mine.json").read_bytes()
    assert list(place.parent.iterdir()) == [place]
    assert main([str(run.folder), str(tmp_path / "bare")]) == 0
    assert "It has no tokenizer" in capsys.readouterr().out
    assert main([str(run.folder), str(tmp_path / "other"), "--tokenizer", "/nowhere.json"]) == 2
    assert "is not a readable tokenizer file" in capsys.readouterr().err
