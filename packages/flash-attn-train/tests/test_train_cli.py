"""The command line: composition, errors, help."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from flash_attn_train.cli import compose_config, main, show_default
from flash_attn_train.configs.checks import options
from flash_attn_train.configs.presets import MODELS, PRESETS
from flash_attn_train.errors import ConfigError


def test_preset_model_and_keys_compose() -> None:
    config = compose_config(["preset=smoke", "model=gpt2", "model.n_layer=3", "data.suffixes=[.txt,.md]"])
    assert config.output_dir == "runs/smoke"
    assert config.model.d_model == PRESETS["smoke"]["model"]["d_model"]
    assert (config.model.norm, config.model.position) == ("layer_norm", "learned")
    assert config.model.n_layer == 3
    assert config.data.suffixes == [".txt", ".md"]


def test_key_wins_over_preset_in_any_order() -> None:
    assert compose_config(["model.n_layer=7", "preset=quickstart"]).model.n_layer == 7


def test_quickstart_is_the_default() -> None:
    assert compose_config([]) == compose_config(["preset=quickstart", "model=llama"])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("model", MODELS)
def test_all_combinations_compose(preset: str, model: str) -> None:
    compose_config([f"preset={preset}", f"model={model}"])


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("model.n_layr=6", ["'model.n_layr'", "nearest valid name is 'model.n_layer'"]),
        ("n_layer=6", ["'n_layer'", "nearest valid name is 'model.n_layer'"]),
        ("trainer.lr=1e-3", ["'trainer.lr'", "nearest valid name is 'optimizer.lr'"]),
        ("presets=quickstart", ["'presets'", "nearest valid name is 'preset'"]),
        ("+model.extra=1", ["'model.extra'", "nearest valid name is 'model."]),
        ("model.n_layer=six", ["model.n_layer", "got 'six' (str)", "expected a whole number"]),
        ("model.n_layer=2.5", ["model.n_layer", "got 2.5 (float)", "expected a whole number"]),
        ("optimizer.lr=fast", ["optimizer.lr", "got 'fast' (str)", "expected a number"]),
        ("data.suffixes=.txt", ["data.suffixes", "got '.txt' (str)", "expected a list of text"]),
        ("data.suffixes=[{a:1}]", ["data.suffixes"]),
        ("preset=quick", ["preset: got 'quick'", "expected one of quickstart, smoke"]),
        ("preset=[smoke]", ["preset: got"]),
        ("model=bert", ["model: got 'bert'", "expected one of llama, gpt2"]),
        ("~model.n_layer", ["'~model.n_layer'", "expected key=value"]),
        ("model.n_layer=1,2", ["'model.n_layer=1,2'", "one value"]),
        ("quickstart", ["'quickstart'", "expected key=value"]),
        ("generation.prompt=f(", ["'generation.prompt=f('", "Quote"]),
        ("--resume", ["'--resume'", "--help"]),
        ("model.dropout=2", ["model.dropout: got 2", "below 1.0"]),
    ],
)
def test_bad_argument_is_explained(argument: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        compose_config([argument])
    for part in parts:
        assert part in str(error.value)


def test_error_goes_to_stderr_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model.n_layr=6"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("flash-attn-train: error: unknown config key 'model.n_layr'")


def test_help_lists_presets_and_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "preset: quickstart (default), smoke" in text
    assert "flash-attn-train preset=quickstart" in text
    for option in options():
        assert f"  {option.key}=" in text
        assert option.metadata["help"] in text


def test_readme_has_the_options_as_they_are() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    table = [line for line in readme.splitlines() if line.startswith("| `")]
    for option in options():
        assert f"| `{option.key}` | `{show_default(option)}` | {option.metadata['help']} |" in table


def test_print_config_writes_a_config_that_composes_to_itself(capsys: pytest.CaptureFixture[str]) -> None:
    from omegaconf import OmegaConf

    assert main(["--print-config", "preset=smoke", "seed=3"]) == 0
    printed = OmegaConf.create(capsys.readouterr().out)
    assert printed.seed == 3
    assert printed == OmegaConf.structured(compose_config(["preset=smoke", "seed=3"]))


def test_help_is_fast_because_it_loads_neither_torch_nor_hydra() -> None:
    program = (
        "import sys; from flash_attn_train.cli import main; main(['--help']);"
        "assert not {'torch', 'hydra', 'pytorch_lightning', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("given", "spin_count"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_waiting_threads_soon_sleep_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], spin_count: str | None
) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ, **given})
    for name in {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} - given.keys():
        os.environ.pop(name, None)
    assert main([f"data.path={tmp_path / 'missing.txt'}"]) == 2
    assert os.environ.get("GOMP_SPINCOUNT") == spin_count


def test_working_directory_stays_and_nothing_is_made_for_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([f"data.path={tmp_path / 'missing.txt'}", f"data.cache_dir={tmp_path / 'cache'}"]) == 2
    assert Path.cwd() == tmp_path
    assert list(tmp_path.iterdir()) == []
