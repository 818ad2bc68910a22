"""The config groups: which entries each has, and how Hydra composes a config from them.

An entry is a config class (``optimizer=lamb``), or a YAML file under ``groups/`` that starts from one and sets some
of its values (``model=gpt2-xl``). Entries of ``experiment`` and ``mode`` set values of all sections.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_origin

from flash_attn_train.configs.callbacks import CallbacksConfig
from flash_attn_train.configs.checks import Option, options
from flash_attn_train.configs.data import DATA
from flash_attn_train.configs.image_data import IMAGE_DATA
from flash_attn_train.configs.logger import LoggerConfig
from flash_attn_train.configs.metrics import MetricsConfig
from flash_attn_train.configs.model import MODELS
from flash_attn_train.configs.optimizer import OPTIMIZERS
from flash_attn_train.configs.scheduler import SCHEDULERS
from flash_attn_train.configs.schema import TrainConfig, TrainerConfig
from flash_attn_train.configs.strategy import STRATEGIES
from flash_attn_train.configs.task import TASKS

FOLDER = Path(__file__).parent / "groups"

# Group -> name -> config class. In the order in which --help lists them.
SCHEMAS: dict[str, Mapping[str, type]] = {
    "experiment": {},
    "mode": {},
    "task": TASKS,
    "model": MODELS,
    "data": {**DATA, **IMAGE_DATA},
    "optimizer": OPTIMIZERS,
    "scheduler": SCHEDULERS,
    "trainer": {"default": TrainerConfig},
    "strategy": STRATEGIES,
    "callbacks": {"default": CallbacksConfig},
    "logger": {"default": LoggerConfig},
    "metrics": {"default": MetricsConfig},
}
DEFAULTS = {
    "task": "language_model",
    "model": "llama",
    "data": "text",
    "optimizer": "adamw",
    "scheduler": "cosine",
    "trainer": "default",
    "strategy": "auto",
    "callbacks": "default",
    "logger": "default",
    "metrics": "default",
    # Last, so that they win: the mode over the experiment, and this over the groups.
    "experiment": "quickstart",
    "mode": "default",
}


def entries(group: str, folders: Sequence[Path] = ()) -> list[str]:
    """Names that a group takes, sorted; experiments in folders are named ``owt/gpt2s``. ``folders`` as for
    :func:`compose`."""
    names = set(SCHEMAS[group])
    for folder in (FOLDER, *folders):
        files = (folder / group).rglob("*.yaml")
        names |= {file.relative_to(folder / group).with_suffix("").as_posix() for file in files}
    return sorted(names)


@functools.cache
def all_options() -> tuple[tuple[str, tuple[Option, ...]], ...]:
    """Every option of every variant, by section: ("model.gpt", (...)). Sections without variants come as ("trainer",
    (...)), options of no section under "". An option that variants share is listed with each."""
    sections = [item for item in dataclasses.fields(TrainConfig) if dataclasses.is_dataclass(item.type)]
    names = {item.name for item in sections}
    found = [("", tuple(option for option in options() if option.key.split(".")[0] not in names))]
    for item in sections:
        assert isinstance(item.type, type)
        variants = SCHEMAS.get(item.name, {})
        read = item.metadata.get("read", ())
        if len(variants) > 1:
            found += [
                (f"{item.name}.{name}", tuple(options(schema, f"{item.name}.", read)))
                for name, schema in variants.items()
            ]
        else:
            found.append((item.name, tuple(options(item.type, f"{item.name}.", read))))
    return tuple(found)


def every_option() -> list[Option]:
    """As :func:`all_options`, in one list: a key that variants share comes with each."""
    return [option for _, section in all_options() for option in section]


def mappings() -> tuple[str, ...]:
    """Beginnings of the keys of mappings, such as "model.config."."""
    return tuple(f"{option.key}." for option in every_option() if get_origin(option.type) is dict)


def describe_entries(config: TrainConfig) -> str:
    """The entries whose classes the config has, as arguments of the command line: what its keys alone do not say."""
    chosen = {
        group: next(name for name, schema in variants.items() if schema is type(getattr(config, group)))
        for group, variants in SCHEMAS.items()
        if len(variants) > 1
    }
    return " ".join(f"{group}={name}" for group, name in chosen.items())


def compose(overrides: Sequence[str], folders: Sequence[Path] = ()) -> Any:
    """The composed config as OmegaConf's DictConfig; ``folders`` with more groups/ are searched after ours.

    Raises what Hydra and OmegaConf raise.
    """
    import hydra
    from hydra.core.override_parser.types import Quote, QuotedString

    _register()
    # In quotes: the path of a folder may have commas.
    places = [QuotedString(text=f"file://{folder.resolve()}", quote=Quote.double) for folder in folders]
    more = [f"hydra.searchpath=[{','.join(place.with_quotes() for place in places)}]"]
    with hydra.initialize_config_dir(version_base=None, config_dir=str(FOLDER)):
        return hydra.compose("train", overrides=[*overrides, *(more if folders else [])])


@functools.cache  # Hydra's store is there once for the process
def _register() -> None:
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    store = ConfigStore.instance()
    schema = OmegaConf.structured(TrainConfig)
    for group, variants in SCHEMAS.items():
        if group in DEFAULTS and variants:
            schema[group] = "???"  # else fields of the default variant would stay when another is chosen
    store.store(name="train_schema", node=schema)
    defaults = ["train_schema", *({group: name} for group, name in DEFAULTS.items()), "_self_"]
    store.store(name="train", node={"defaults": defaults})
    for group, variants in SCHEMAS.items():
        for name, variant in variants.items():
            store.store(group=group, name=name, node=variant)
