"""Measuring trained models."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flash_attn_models import save_pretrained
from flash_attn_train.checkpoints import read_checkpoint
from flash_attn_train.cli import compose_config
from flash_attn_train.configs import BertModelConfig, CallbacksConfig, MaskedLMConfig, TrainConfig
from flash_attn_train.configs.callbacks import EMAConfig
from flash_attn_train.configs.checks import flatten
from flash_attn_train.distributed.checkpoint_folder import write_checkpoint_folder
from flash_attn_train.errors import CheckpointError, ConfigError
from flash_attn_train.evaluate import evaluate, main
from flash_attn_train.restore import restore
from flash_attn_train.run import train
from flash_attn_train.saved_config import restore_config
from flash_attn_train.summary import RunResult
from tokenizers import Tokenizer


@pytest.fixture(scope="module")
def other_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    for number in range(12):
        (folder / f"{number}.txt").write_text(f"the cat {number} sees the bird.\n" * 30)
    return folder


@pytest.fixture
def run(small_config: Callable[..., TrainConfig]) -> RunResult:
    return train(small_config(trainer={"val_sequences": 5}))


def test_measures_what_training_did(run: RunResult, other_corpus: Path, tmp_path: Path) -> None:
    result = evaluate(str(run.folder), ["trainer.val_sequences=5"])
    assert result["metrics"]["loss"] == pytest.approx(run.last_val_loss, rel=1e-6)
    assert result["metrics"]["perplexity"] == pytest.approx(math.exp(run.last_val_loss), rel=1e-5)
    assert result["metrics"]["bits_per_byte"] == pytest.approx(run.last_val["val/bits_per_byte"], rel=1e-5)
    assert (result["step"], result["weights"], result["num_samples"]) == (6, "trained", 5)
    assert result["checkpoint"] == str(run.last_checkpoint)

    everything = evaluate(str(run.best_checkpoint))
    assert everything["num_samples"] > 5

    # Other text, in the tokens of the run.
    overrides = ["data=text", f"data.path={other_corpus}", f"data.cache_dir={tmp_path / 'cache'}"]
    other = evaluate(str(run.folder), [*overrides, "data.val_fraction=0.3"])
    assert str(other_corpus) in other["data"]["corpus"]
    assert other["metrics"]["loss"] != everything["metrics"]["loss"]
    assert len(restore(str(run.folder)).model.state_dict()) == len(
        read_checkpoint(run.last_checkpoint)["state_dict"]
    )


def test_a_checkpoint_of_many_files(run: RunResult, tmp_path: Path) -> None:
    whole = read_checkpoint(run.last_checkpoint)
    whole.pop("optimizer_states")
    write_checkpoint_folder(tmp_path / "many" / "checkpoints" / "last.ckpt", whole, [])
    shutil.copy(run.folder / "tokenizer.json", tmp_path / "many")
    result = evaluate(str(tmp_path / "many"), ["trainer.val_sequences=5"])
    assert result["metrics"]["loss"] == pytest.approx(run.last_val_loss, rel=1e-6)


def test_averaged_weights_by_default(small_config: Callable[..., TrainConfig]) -> None:
    callbacks = CallbacksConfig(ema=EMAConfig(enabled=True, decay=0.5))
    run = train(small_config(callbacks=callbacks, trainer={"val_sequences": None}, optimizer={"lr": 1e-2}))
    averaged, trained = (evaluate(str(run.folder), use_ema=use_ema) for use_ema in (True, False))
    assert averaged["metrics"]["loss"] == pytest.approx(run.last_val_loss, rel=1e-6)
    assert abs(trained["metrics"]["loss"] - run.last_val_loss) > 1e-5
    assert (averaged["weights"], trained["weights"]) == ("averaged", "trained")


def test_command_prints_writes_and_refuses(
    run: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    file = tmp_path / "result.json"
    assert main([str(run.folder), "trainer.val_sequences=3", "--output", str(file)]) == 0
    printed = capsys.readouterr().out
    for part in ("step 6, trained weights", "perplexity", "bits_per_byte", "3 samples in 32-true"):
        assert part in printed
    written = json.loads(file.read_text())
    assert written["num_samples"] == 3 and written["source"] == str(run.folder)

    assert main([str(run.folder), "--json", "trainer.val_sequences=3"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == written["metrics"]

    for arguments, part in (
        ([str(tmp_path / "nothing.ckpt")], "does not exist"),
        ([str(tmp_path)], "cannot be read"),
        ([str(run.folder), "data.nonsense=1"], "unknown config key 'data.nonsense'"),
        ([str(run.folder), "experiment=quickstart"], "experiment: got a value, expected none"),
        ([str(run.folder), "model.n_layer=2"], "has not the weights of the model"),
        ([str(run.folder), "tokenizer.vocab_size=3"], "tokenizer.vocab_size"),
        ([str(run.folder), "--output", "/nowhere/at/all.json"], "--output"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("flash-attn-evaluate: error: ") and part in error
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0 and "examples:" in capsys.readouterr().out


def test_damaged_checkpoint(run: RunResult) -> None:
    run.last_checkpoint.write_bytes(run.last_checkpoint.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        evaluate(str(run.folder))
    run.last_checkpoint.unlink()
    with pytest.raises(CheckpointError, match=r"last\.ckpt does not exist"):
        evaluate(str(run.folder))


def test_the_tokenizer_is_the_runs_wherever_it_came_from(
    small_config: Callable[..., TrainConfig], run: RunResult, tmp_path: Path
) -> None:
    file = shutil.copy(run.folder / "tokenizer.json", tmp_path / "mine.json")
    second = train(small_config(tokenizer={"path": str(file)}, trainer={"val_sequences": 5}))
    file.rename(tmp_path / "moved.json")
    for overrides in ([], [f"tokenizer.path={tmp_path / 'moved.json'}"]):
        result = evaluate(str(second.folder), ["trainer.val_sequences=5", *overrides])
        assert result["metrics"]["loss"] == pytest.approx(second.last_val_loss, rel=1e-6)
    assert restore(str(second.folder), ["tokenizer.name=gpt2"]).config.tokenizer.path is None


def test_a_moved_checkpoint_is_not_measured_in_other_tokens(
    run: RunResult, other_corpus: Path, tmp_path: Path
) -> None:
    """Its tokenizer stayed in the run folder: on the same data the same one is trained again, elsewhere another."""
    moved = run.last_checkpoint.rename(tmp_path / "moved.ckpt")
    result = evaluate(str(moved), ["trainer.val_sequences=5"])
    assert result["metrics"]["loss"] == pytest.approx(run.last_val_loss, rel=1e-6)
    other = [f"data.path={other_corpus}", "data.val_fraction=0.3", f"data.cache_dir={tmp_path / 'cache'}"]
    with pytest.raises(ConfigError, match=r"the model has another, .*tokenizer\.path=TOKENIZER_JSON"):
        evaluate(str(moved), other)
    evaluate(str(moved), [*other, f"tokenizer.path={run.folder / 'tokenizer.json'}"])


def test_one_device(run: RunResult) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.devices: got 2, expected 1"):
        evaluate(str(run.folder), ["trainer.devices=2"])


def test_a_checkpoint_without_config_takes_it_from_overrides(run: RunResult, tmp_path: Path) -> None:
    """As Lightning writes it for any module with an attribute ``model``."""
    whole = read_checkpoint(run.last_checkpoint)
    torch.save({"state_dict": whole["state_dict"], "global_step": 6}, tmp_path / "plain.ckpt")
    saved = whole["config"]
    overrides = [
        *("model=gpt", "model.max_seqlen=16", "model.n_layer=1", "model.n_head=2", "model.d_model=16"),
        *(f"data.path={saved['data.path']}", f"data.cache_dir={saved['data.cache_dir']}"),
        *("data.val_fraction=0.2", f"tokenizer.path={run.folder / 'tokenizer.json'}"),
    ]
    result = evaluate(str(tmp_path / "plain.ckpt"), overrides)
    assert result["metrics"]["loss"] == pytest.approx(evaluate(str(run.folder))["metrics"]["loss"], rel=1e-6)


def test_hugging_face_folder(run: RunResult, tmp_path: Path) -> None:
    save_pretrained(restore(str(run.folder)).model, tmp_path / "hf")
    saved = read_checkpoint(run.last_checkpoint)["config"]
    data = [
        f"data.path={saved['data.path']}",
        f"data.cache_dir={saved['data.cache_dir']}",
        "data.val_fraction=0.2",
    ]
    data += ["trainer.batch_size=4", "model.max_seqlen=16"]
    tokenizer = f"tokenizer.path={run.folder / 'tokenizer.json'}"
    expected = evaluate(str(run.folder))["metrics"]["loss"]
    result = evaluate(str(tmp_path / "hf"), [*data, tokenizer])
    assert result["metrics"]["loss"] == pytest.approx(expected, rel=1e-6)
    assert (result["step"], result["checkpoint"]) == (None, None)
    # Its own tokenizer, and transformers' model.
    shutil.copy(run.folder / "tokenizer.json", tmp_path / "hf")
    pytest.importorskip("transformers", reason="loads the folder with transformers")
    theirs = evaluate(str(tmp_path / "hf"), ["model=hugging_face", *data])
    assert theirs["metrics"]["loss"] == pytest.approx(expected, rel=1e-4)


def test_masked_lm_and_a_tokenizer_that_does_not_fit(
    small_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    model = BertModelConfig(max_seqlen=16, n_layer=1, n_head=2, d_model=16)
    run = train(small_config(model=model, task=MaskedLMConfig(), trainer={"val_sequences": None}))
    result = evaluate(str(run.folder))
    assert result["metrics"]["loss"] == pytest.approx(run.last_val_loss, rel=1e-6)
    assert "bits_per_byte" not in result["metrics"] and "accuracy" in result["metrics"]
    larger = Tokenizer.from_file(str(run.folder / "tokenizer.json"))
    larger.add_tokens([f"word{number}" for number in range(100)])
    larger.save(str(tmp_path / "larger.json"))
    with pytest.raises(ConfigError, match=r"tokenizer: got a vocabulary of 4\d\d, but the model has 3\d\d"):
        evaluate(str(run.folder), [f"tokenizer.path={tmp_path / 'larger.json'}"])


def test_vision_transformer(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="has the digits: pip install flash-attn-train[images]")
    overrides = ["experiment=digits", "trainer.max_steps=2", "trainer.val_every_n_steps=2"]
    config = compose_config([*overrides, "checkpoint.every_n_steps=2", f"output_dir={tmp_path / 'run'}"])
    run = train(dataclasses.replace(config, logger=dataclasses.replace(config.logger, tensorboard=False)))
    result = evaluate(str(run.folder))
    assert result["num_samples"] == 355
    assert result["metrics"]["accuracy"] == pytest.approx(run.last_val["val/accuracy"])
    save_pretrained(restore(str(run.folder)).model, tmp_path / "hf")
    again = evaluate(str(tmp_path / "hf"), ["data=digits"])
    assert again["metrics"]["loss"] == pytest.approx(result["metrics"]["loss"], rel=1e-5)


def test_classes_of_other_names_are_refused(tmp_path: Path) -> None:
    """As many, but numbered otherwise: an accuracy would mean nothing."""

    def write(name: str, labels: tuple[str, ...]) -> str:
        rows = [
            {"text": f"text {label} {number}", "label": label} for number in range(20) for label in labels
        ]
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        return f"data.path={tmp_path / name}"

    run = train(
        compose_config(
            [
                *("experiment=none", "task=sequence_classification", "model=bert", "data=labelled_text"),
                *("model.max_seqlen=8", "model.n_layer=1", "model.n_head=2", "model.d_model=16"),
                *(write("rows.jsonl", ("bad", "good")), "data.val_fraction=0.4", "tokenizer.vocab_size=300"),
                *("trainer.max_steps=1", "logger.tensorboard=false", f"output_dir={tmp_path / 'run'}"),
            ]
        )
    )
    same = evaluate(str(run.folder), [write("same.jsonl", ("good", "bad"))])
    assert same["metrics"]["accuracy"] >= 0
    with pytest.raises(
        ConfigError, match=r"data: got classes of other names .* 'good' in place of 'bad' \(2 of 2"
    ):
        evaluate(str(run.folder), [write("other.jsonl", ("good", "worse"))])


def test_restored_config_is_the_saved_one_but_for_overrides(small_config: Callable[..., TrainConfig]) -> None:
    config = small_config(model={"n_head_kv": 1}, seed=7)
    saved = flatten(config)
    again = restore_config(saved, source="x")
    for section in ("seed", "task", "model", "data", "tokenizer", "trainer", "metrics"):
        assert getattr(again, section) == getattr(config, section)
    changed = restore_config(saved, ["data=hub_text", "data.name=a/b", "trainer.batch_size=2"], source="x")
    assert type(changed.data).__name__ == "HubTextDataConfig" and changed.trainer.batch_size == 2
    assert changed.trainer.val_sequences == config.trainer.val_sequences
    with pytest.raises(CheckpointError, match=r"x: its config has model\.gone=1, which this version"):
        restore_config({**saved, "model.gone": 1}, source="x")
    with pytest.raises(
        CheckpointError, match="x: its config has the model 'Gone', expected one of GPTModelConfig"
    ):
        restore_config({**saved, "model": "Gone"}, source="x")
