"""The command line: a config from groups and ``key=value`` arguments, composed by Hydra.

Hydra's compose interface is used, not its application runner: nothing changes the working directory (there is
no ``hydra.job.chdir``), no output folders or loggers are made behind the user's back, and no resolvers are
registered.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flash_attn_train import __version__
from flash_attn_train.cli_errors import not_in_variant, translated
from flash_attn_train.cli_help import help_text
from flash_attn_train.command import command
from flash_attn_train.configs import TrainConfig, check_config, check_read
from flash_attn_train.configs.checks import unknown_key
from flash_attn_train.configs.store import SCHEMAS, compose, describe_entries, entries, every_option, mappings
from flash_attn_train.errors import ConfigError

_PRESET = "preset"  # another word for the group `experiment`
_CONFIG_DIR = "--config-dir="
_HELP = "--help="


@command("flash-attn-train")  # Ctrl-C in training is answered by the checkpoint callback
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns the exit code, see :func:`~flash_attn_train.command.command`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--version" in arguments:
        print(f"flash-attn-train {__version__}")
        return 0
    print_config = "--print-config" in arguments
    topic = _help_topic(arguments)
    if topic is not None:
        print(help_text(topic, _config_dirs(arguments)))
        return 0
    config = compose_config([argument for argument in arguments if argument != "--print-config"])
    if print_config:
        from omegaconf import OmegaConf

        print(f"# {describe_entries(config)}")
        print(OmegaConf.to_yaml(OmegaConf.structured(config)), end="")
        return 0
    # Read by GNU OpenMP when torch loads: how long a thread that waits for the others spins before it sleeps.
    # By default it is so long that, where something else runs too, spinning takes the cores from the threads
    # that are waited for.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    print(f"flash-attn-train {__version__}", flush=True)  # before the wait for torch to load
    from flash_attn_train.distributed import ending_process_group
    from flash_attn_train.run import train

    with ending_process_group():
        train(config)
    return 0


def compose_config(arguments: Sequence[str]) -> TrainConfig:
    """The config of a run from groups and ``key=value`` arguments, checked. ``--config-dir=FOLDER`` adds groups of
    one's own.

    Raises:
        ConfigError: an argument is no ``key=value``, a key or entry is unknown, a value does not fit, or a key is set
            that the run does not read.
    """
    config, keys = _compose(arguments)
    check_read(config, keys)
    return config


def compose_part(arguments: Sequence[str]) -> TrainConfig:
    """As :func:`compose_config`, where more values come from elsewhere: keys may be set that nothing reads yet."""
    return _compose(arguments)[0]


def _compose(arguments: Sequence[str]) -> tuple[TrainConfig, list[str]]:
    """The config, and the keys that the arguments set."""
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError  # type: ignore[import-untyped, unused-ignore]

    folders = _config_dirs(arguments)
    overrides = [_literal(_experiment(text)) for text in arguments if not text.startswith(_CONFIG_DIR)]
    values = _check_overrides(overrides, folders)
    # An entry of a mapping is new or not: the user need not know Hydra's sign for it.
    overrides = [f"++{text}" if _sets_entries(text.partition("=")[0]) else text for text in overrides]
    try:
        config = OmegaConf.to_object(compose(overrides, folders))
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise translated(error, values) from error
    assert isinstance(config, TrainConfig)
    for key in values:
        section, field = (*key.split("."), "")[:2]
        # An entry of a mapping that the chosen variant does not have: it has become an attribute that nobody reads.
        if _sets_entries(key) and field not in vars(type(getattr(config, section))()):
            raise not_in_variant(key)
    if config.smoke:
        from flash_attn_train.configs.smoke import smoke

        config = smoke(config, keep=[key for key in values if key not in SCHEMAS])
    check_config(config)
    return config, list(values)


def _sets_entries(key: str) -> bool:
    """Whether the key is a mapping's, such as model.config, or an entry's of one."""
    return f"{key}.".startswith(mappings())


def _experiment(text: str) -> str:
    return f"experiment={text.removeprefix('preset=')}" if text.startswith(f"{_PRESET}=") else text


def _literal(text: str) -> str:
    """A text that Hydra's grammar has another meaning for, or none, such as a path with "~", "," or "=", is taken as
    it stands."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Quote, QuotedString
    from hydra.errors import HydraException

    key, _, value = text.partition("=")
    if key not in {option.key for option in every_option() if option.type in (str, str | None)}:
        return text
    try:
        override = OverridesParser.create().parse_override(text)
        is_text = not override.is_sweep_override() and not isinstance(override.value(), (list, dict))
    except HydraException:
        is_text = False
    return text if is_text else f"{key}={QuotedString(text=value, quote=Quote.double).with_quotes()}"


def _help_topic(arguments: Sequence[str]) -> str | None:
    """What help is asked on, see :func:`flash_attn_train.cli_help.help_text`; None if none is."""
    for argument in arguments:
        if argument.startswith(_HELP):
            return argument.removeprefix(_HELP)
    return "" if {"-h", "--help"} & set(arguments) else None


def _config_dirs(arguments: Sequence[str]) -> list[Path]:
    return [_config_dir(text) for text in arguments if text.startswith(_CONFIG_DIR)]


def _config_dir(text: str) -> Path:
    folder = Path(text.removeprefix(_CONFIG_DIR)).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"--config-dir: {folder} is not a folder; expected one with groups, such as experiment/mine.yaml in it."
        )
    return folder


def _check_overrides(overrides: Sequence[str], folders: Sequence[Path]) -> dict[str, Any]:
    """Checks names before Hydra does, which knows no nearest name. Returns key -> value."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    known = [*SCHEMAS, *dict.fromkeys(option.key for option in every_option())]
    of_mappings = mappings()
    parser = OverridesParser.create()
    values = {}
    for text in overrides:
        if text.startswith("-"):
            raise ConfigError(
                f"got {text!r}, expected key=value or one of --help, --help=SECTION, --version, --print-config, "
                "--config-dir=FOLDER."
            )
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            raise ConfigError(
                f"cannot read {text!r}: {error}; expected key=value. Quote a value that has special "
                "characters: 'key=\"value\"'."
            ) from error
        key = override.key_or_group
        if key not in known and not key.startswith(of_mappings):
            raise unknown_key(key, [_PRESET, *known])
        if (override.is_add() and not key.startswith(of_mappings)) or override.is_delete():
            raise ConfigError(
                f"got {text!r}, expected key=value with one value; keys cannot be added or removed."
            )
        if override.is_sweep_override():
            raise ConfigError(f"got {text!r}, expected key=value with one value.")
        value = override.value()
        if key in SCHEMAS and value not in entries(key, folders):
            raise _unknown_entry(key, value, entries(key, folders))
        values[key] = value
    return values


def _unknown_entry(group: str, value: Any, known: list[str]) -> ConfigError:
    nearest = difflib.get_close_matches(str(value), known, n=1, cutoff=0.5)
    # "gpt2s" for "owt/gpt2s"
    nearest = [name for name in known if name.split("/")[-1] == value] or nearest
    hint = f" The nearest is {nearest[0]!r}." if nearest else ""
    return ConfigError(f"{group}: got {value!r}, expected one of {', '.join(known)}.{hint}")


if __name__ == "__main__":
    sys.exit(main())
