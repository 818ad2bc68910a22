"""The command line: composition, errors, help."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from flash_attn_train.cli import compose_config, main
from flash_attn_train.cli_help import help_text, show_default
from flash_attn_train.configs import GPTModelConfig, HuggingFaceModelConfig, TextDataConfig
from flash_attn_train.configs.optimizer import LambConfig
from flash_attn_train.configs.store import DEFAULTS, SCHEMAS, all_options, entries
from flash_attn_train.errors import ConfigError


def test_experiment_model_and_keys_compose() -> None:
    config = compose_config(
        [
            *("experiment=smoke", "model=gpt2", "model.n_layer=3", "optimizer=lamb"),
            *("data.path=mine", "data.suffixes=[.txt,.md]"),
        ]
    )
    assert config.output_dir == "runs/smoke"
    assert isinstance(config.model, GPTModelConfig) and isinstance(config.optimizer, LambConfig)
    assert isinstance(config.data, TextDataConfig)
    assert (config.model.norm, config.model.position) == ("layer_norm", "learned")
    assert config.model.n_layer == 3
    assert config.data.suffixes == [".txt", ".md"]


@pytest.mark.parametrize("sign", ["", "+"])
def test_new_entries_of_a_mapping(sign: str) -> None:
    config = compose_config(
        ["experiment=owt/gpt2s-hf", f"{sign}model.config.n_inner=96", "model.config.n_layer=3"]
    )
    assert isinstance(config.model, HuggingFaceModelConfig)
    assert (config.model.config["n_inner"], config.model.config["n_layer"]) == (96, 3)


def test_several_entries_of_a_mapping() -> None:
    config = compose_config(["experiment=owt/gpt2s-hf", "model.config={n_inner: 96, n_layer: 3}"])
    assert isinstance(config.model, HuggingFaceModelConfig)
    # The others stay.
    entries = config.model.config
    assert (entries["n_inner"], entries["n_layer"], entries["n_head"]) == (96, 3, 12)


def test_key_wins_over_experiment_in_any_order() -> None:
    config = compose_config(["model.n_layer=7", "experiment=quickstart"])
    assert isinstance(config.model, GPTModelConfig) and config.model.n_layer == 7


def test_quickstart_is_the_default_and_preset_another_word_for_experiment() -> None:
    assert (
        compose_config([])
        == compose_config(["preset=quickstart"])
        == compose_config(["experiment=quickstart"])
    )


def test_a_named_model_has_its_own_size_in_any_experiment() -> None:
    config = compose_config(["experiment=quickstart", "model=gpt2-medium"])
    assert isinstance(config.model, GPTModelConfig)
    assert (config.model.n_layer, config.model.d_model) == (24, 1024)


@pytest.mark.parametrize(
    "group", [name for name in SCHEMAS if name not in ("experiment", "mode", "model", "task", "data")]
)
def test_every_entry_of_a_group_composes(group: str) -> None:
    for name in entries(group):
        compose_config([f"{group}={name}"])


def test_own_groups_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [override /model: gpt2-small]\nseed: 7\n"
    )
    assert ", mine, " in help_text("experiment", [tmp_path])
    config = compose_config(["experiment=mine", f"--config-dir={tmp_path}"])
    assert config.seed == 7 and isinstance(config.model, GPTModelConfig) and config.model.n_layer == 12
    with pytest.raises(ConfigError, match="is not a folder"):
        compose_config([f"--config-dir={tmp_path / 'nowhere'}"])


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
        ("preset=quick", ["experiment: got 'quick'", "quickstart", "owt/gpt2s"]),
        ("preset=[smoke]", ["experiment: got"]),
        ("model=bart", ["model: got 'bart'", "bert-base", "gpt2-xl"]),
        (
            "model=bert-base",
            ["model: got BertModelConfig for the task LanguageModelConfig", "GPTModelConfig"],
        ),
        (
            "task.mask_probability=0.2",
            ["task.mask_probability: the chosen task has no such key", "masked_lm"],
        ),
        (
            "model.config.n_layer=3",
            ["model.config.n_layer: the chosen model has no such key", "hugging_face"],
        ),
        (
            "model.config={n_layer: 3}",
            ["model.config: the chosen model has no such key", "hugging_face"],
        ),
        ("trainer.gpus=2", ["'trainer.gpus'", "'trainer.", "--help=trainer"]),
        ("experiment=gpt2s", ["The nearest is 'owt/gpt2s'"]),
        ("~model.n_layer", ["'~model.n_layer'", "expected key=value"]),
        ("model.n_layer=1,2", ["'model.n_layer=1,2'", "one value"]),
        ("quickstart", ["'quickstart'", "expected key=value"]),
        ("optimizer.lr=f(", ["'optimizer.lr=f('", "Quote"]),
        (
            "optimizer.overrides=[{patern: x}]",
            ["optimizer.overrides: Key 'patern' not in 'ParameterOverride'", "--help=optimizer.overrides"],
        ),
        ("output_dir=${now}", ["output_dir: Interpolation key 'now' not found", "'\\${'"]),
        ("output_dir=", ["output_dir: got ''", "expected a folder"]),
        ("--resume", ["'--resume'", "--help"]),
        ("model.dropout=2", ["model.dropout: got 2", "below 1.0"]),
    ],
)
def test_bad_argument_is_explained(argument: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        compose_config([argument])
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "~/runs/x",
        "a,b",
        "a(b)",
        "x=1",
        "my runs/x y",
        "run #3",
        'say "hi", {you}',
        "C:\\x\\",
        "[a]",
        "~/x, 'y'",
        "50%",
    ],
)
def test_texts_need_no_quotes(text: str) -> None:
    config = compose_config([f"output_dir={text}", f"generation.prompt={text}"])
    assert (config.output_dir, config.generation.prompt) == (text, text)
    if '"' not in text and not text.endswith("\\"):
        assert compose_config([f'output_dir="{text}"']).output_dir == text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "optimizer: {lrr: 1}",
            r"^experiment/mine\.yaml: unknown config key 'optimizer\.lrr': .*'optimizer\.lr'",
        ),
        ("lr: 1", r"^experiment/mine\.yaml: unknown config key 'lr': .*'optimizer\.lr'"),
        (
            "optimizer: {momentum: 0.5}",
            r"optimizer\.momentum: the chosen optimizer has no such key; .* of sgd",
        ),
        (
            "optimizer: {lr: fast}",
            r"^experiment/mine\.yaml: optimizer\.lr: Value 'fast' .*; expected a number",
        ),
        ("model: {n_layer: 0}", r"^model\.n_layer: got 0, expected a whole number, at least 1"),
        ("optimizer: [", r"mine\.yaml"),
        ("defaults: [override /model: gpt2-smal]", r"Could not find 'model/gpt2-smal'"),
    ],
)
def test_mistakes_in_an_experiment_of_ones_own(tmp_path: Path, content: str, message: str) -> None:
    folder = tmp_path / "my configs, all"
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{content}\n")
    with pytest.raises(ConfigError, match=message):
        compose_config([f"--config-dir={folder}", "experiment=mine"])


def test_an_experiment_without_its_package(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("seed: 1\n")
    with pytest.raises(ConfigError, match=r"experiment/mine\.yaml: expected '# @package _global_'"):
        compose_config([f"--config-dir={tmp_path}", "experiment=mine"])


def test_error_goes_to_stderr_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model.n_layr=6"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("flash-attn-train: error: unknown config key 'model.n_layr'")


def test_help_lists_groups_and_sections_on_a_few_screens(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for group, default in DEFAULTS.items():
        assert f"  {group}: {default}" in text
        assert all(name in text for name in entries(group))
    for section, options in all_options():
        assert f"  {section}" in text if section else f"  {options[0].key}=" in text
    lines = text.splitlines()
    assert len(lines) < 130 and max(map(len, lines)) <= 120


def test_help_on_everything_has_every_option() -> None:
    text = help_text("all")
    for _, section in all_options():
        for option in section:
            assert f"  {option.key}=" in text
            assert option.metadata["help"] in text


@pytest.mark.parametrize(
    ("topic", "parts", "absent"),
    [
        (
            "model",
            ["model: llama, bert", "model.gpt: A decoder", "model.vit: A vision", "model.n_head_kv="],
            "seed=",
        ),
        ("model.bert", ["model.bert: ", "  model.n_layer=12"], "n_head_kv"),
        ("trainer", ["trainer: default, cpu", "  trainer.max_steps=500"], "model."),
        ("optimizer.momentum", ["optimizer.sgd: ", "  optimizer.momentum=0.9"], "lamb"),
        ("experiment", ["experiment: quickstart", "owt/gpt2s"], "="),
        ("seed", ["  seed=0"], "resume"),
        (
            "generation.prompt",
            ["for task=language_model; for model=gpt; for generation.max_new_tokens other"],
            "top",
        ),
        ("callbacks.ema.enabled", ["[true or false]"], "decay"),
        ("callbacks.ema.decay", ["below 1.0; for callbacks.ema.enabled=true]"], "warmup"),
    ],
)
def test_help_on_a_section(topic: str, parts: list[str], absent: str) -> None:
    text = help_text(topic)
    assert all(part in text for part in parts)
    assert absent not in text


def test_help_on_what_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help=modl"]) == 2
    assert "unknown config key 'modl': the nearest valid name is 'model'" in capsys.readouterr().err


def test_readme_has_the_options_as_they_are() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    table = [line for line in readme.splitlines() if line.startswith("| `")]
    for _, section in all_options():
        for option in section:
            meaning = option.metadata["help"].replace("|", "\\|")
            assert f"| `{option.key}` | `{show_default(option)}` | {meaning} |" in table


def test_print_config_writes_a_config_that_composes_to_itself(capsys: pytest.CaptureFixture[str]) -> None:
    from omegaconf import OmegaConf

    assert main(["--print-config", "preset=smoke", "seed=3"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(
        "# task=language_model model=gpt data=text optimizer=adamw scheduler=cosine strategy=auto\n"
    )
    printed = OmegaConf.create(text)
    assert printed.seed == 3
    assert printed == OmegaConf.structured(compose_config(["preset=smoke", "seed=3"]))


def test_help_is_fast_because_it_loads_neither_torch_nor_hydra() -> None:
    program = (
        "import sys; from flash_attn_train.cli import main; main(['--help']);"
        "assert not {'torch', 'hydra', 'pytorch_lightning', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


def test_ctrl_c_before_training(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(config: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flash_attn_train.run.build_data", interrupted)
    assert main([f"output_dir={tmp_path / 'run'}"]) == 130
    assert capsys.readouterr().err == "flash-attn-train: interrupted\n"


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
