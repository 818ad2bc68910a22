"""The repository as the tools see it: its root and its four packages, lowest layer first."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("kernels", "ops", "models", "train")


@dataclass(frozen=True)
class Package:
    layer: str
    root: Path = ROOT

    @property
    def distribution(self) -> str:
        return f"flash-attn-{self.layer}"

    @property
    def module(self) -> str:
        return f"flash_attn_{self.layer}"

    @property
    def folder(self) -> Path:
        return self.root / "packages" / self.distribution

    @property
    def source(self) -> Path:
        return self.folder / "src"

    @property
    def pyproject(self) -> Path:
        return self.folder / "pyproject.toml"

    @property
    def init_file(self) -> Path:
        return self.source / self.module / "__init__.py"

    @property
    def below(self) -> Package | None:
        """The one layer that this one may import."""
        index = LAYERS.index(self.layer)
        return Package(LAYERS[index - 1], self.root) if index else None


def packages(root: Path = ROOT) -> list[Package]:
    return [Package(layer, root) for layer in LAYERS]


def version(root: Path = ROOT) -> str:
    """The shared version, as the lowest package states it."""
    found = re.search(r'^version = "([^"]+)"$', packages(root)[0].pyproject.read_text(), re.MULTILINE)
    if found is None:
        raise ValueError(f'{packages(root)[0].pyproject} has no line like: version = "1.2.3"')
    return found.group(1)
