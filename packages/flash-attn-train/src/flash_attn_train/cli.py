"""The command line: Hydra composes a config from presets and ``key=value`` arguments; this module alone knows
Hydra.

Hydra's compose interface is used, not its application runner: nothing changes the working directory (there is
no ``hydra.job.chdir``), no output folders or loggers are made behind the user's back, and no resolvers are
registered.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from flash_attn_train import __version__
from flash_attn_train.configs import TrainConfig, check_config
from flash_attn_train.configs.checks import Option, describe_limits, options, unknown_key, wrong_type
from flash_attn_train.configs.presets import MODELS, PRESETS
from flash_attn_train.errors import ConfigError, UserError

_GROUPS = {"preset": PRESETS, "model": MODELS}
_DEFAULT_GROUPS = {"model": "llama", "preset": "quickstart"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns the exit code: 0, or 2 after printing what is wrong with the input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(arguments):
        print(help_text())
        return 0
    if "--version" in arguments:
        print(f"flash-attn-train {__version__}")
        return 0
    print_config = "--print-config" in arguments
    try:
        config = compose_config([argument for argument in arguments if argument != "--print-config"])
        if print_config:
            from omegaconf import OmegaConf

            print(OmegaConf.to_yaml(OmegaConf.structured(config)), end="")
            return 0
        # Read by GNU OpenMP when torch loads: how long a thread that waits for the others spins before it sleeps.
        # By default it is so long that, where something else runs too, spinning takes the cores from the threads
        # that are waited for.
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", "1000")
        print(f"flash-attn-train {__version__}", flush=True)  # before the wait for torch to load
        from flash_attn_train.run import train

        train(config)
    except UserError as error:
        print(f"flash-attn-train: error: {error}", file=sys.stderr)
        return 2
    return 0


def compose_config(overrides: Sequence[str]) -> TrainConfig:
    """The config of presets and ``key=value`` arguments, checked.

    Raises:
        ConfigError: an argument is no ``key=value``, a key or preset is unknown, or a value does not fit.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    values = _check_overrides(overrides)
    _register()
    try:
        with hydra.initialize(version_base=None, config_path=None):
            composed = hydra.compose("train", overrides=list(overrides))
        config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise _translated(error, values) from error
    assert isinstance(config, TrainConfig)
    check_config(config)
    return config


def _register() -> None:
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    defaults = ["train_schema", *({group: name} for group, name in _DEFAULT_GROUPS.items()), "_self_"]
    store.store(name="train", node={"defaults": defaults})
    for name, node in PRESETS.items():
        store.store(group="preset", name=name, node=node, package="_global_")
    for name, node in MODELS.items():
        store.store(group="model", name=name, node=node)


def _check_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Checks names before Hydra does, which knows no nearest name. Returns key -> value."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    known = [*_GROUPS, *(option.key for option in options())]
    parser = OverridesParser.create()
    values = {}
    for text in overrides:
        if text.startswith("-"):
            raise ConfigError(
                f"got {text!r}, expected key=value or one of --help, --version, --print-config."
            )
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            raise ConfigError(
                f"cannot read {text!r}: {error}; expected key=value. Quote a value that has special "
                "characters: 'key=\"value\"'."
            ) from error
        key = override.key_or_group
        if key not in known:
            raise unknown_key(key, known)
        if override.is_add() or override.is_delete() or override.is_sweep_override():
            raise ConfigError(
                f"got {text!r}, expected key=value with one value; keys cannot be added or removed."
            )
        value = override.value()
        if key in _GROUPS and value not in list(_GROUPS[key]):
            raise ConfigError(f"{key}: got {value!r}, expected one of {', '.join(_GROUPS[key])}.")
        values[key] = value
    return values


def _translated(error: Exception, values: dict[str, Any]) -> ConfigError:
    """Hydra's error in this package's words: key, got, expected."""
    cause: BaseException | None = error
    while cause is not None:
        key = getattr(cause, "full_key", None)
        for option in options():
            if key and (option.key == key or key.startswith(option.key + "[")) and option.key in values:
                return wrong_type(option.key, values[option.key], option.type)
        cause = cause.__cause__
    return ConfigError(str(error))


def help_text() -> str:
    """Usage, presets, and every option with its type, default and meaning."""
    lines = [
        "Pretrain a language model on text.",
        "",
        "usage: flash-attn-train [preset=NAME] [model=NAME] [key=value ...]",
        "       flash-attn-train --help | --version | [...] --print-config",
        "",
        "examples:",
        "  flash-attn-train preset=quickstart",
        "  flash-attn-train preset=quickstart data.path=my_texts/ model.n_layer=6 trainer.max_steps=2000",
        "  flash-attn-train preset=quickstart resume=true",
        "",
    ]
    for group, entries in _GROUPS.items():
        default = _DEFAULT_GROUPS[group]
        lines.append(
            f"{group}: " + ", ".join(f"{name} (default)" if name == default else name for name in entries)
        )
    lines += [
        "",
        "options, with the defaults where no preset sets another (--print-config shows the result):",
    ]
    section = ""
    for option in options():
        if option.key.rpartition(".")[0] != section:
            section = option.key.rpartition(".")[0]
            lines.append("")
        lines.append(f"  {option.key}={show_default(option)}")
        lines.append(f"      {option.metadata['help']} [{describe_limits(option)}]")
    return "\n".join(lines)


def show_default(option: Option) -> str:
    """The default as one would write it on the command line."""
    if option.default is None:
        return "null"
    return str(option.default).lower() if isinstance(option.default, bool) else str(option.default)


if __name__ == "__main__":
    sys.exit(main())
