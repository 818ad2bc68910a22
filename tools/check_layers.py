"""Checks the rules between the layers that import-linter does not see.

- Every Python file of a package, its tests and benchmarks included, imports of the four packages only its own
  and the one right below; import-linter sees the packages themselves alone.
- One version everywhere; each package pins the layer right below with `==` and no other layer.
- Third-party requirements are floors: `>=`, and `!=` for a release known to be bad; no ceilings and no pins.
- The license file in each package is the repository's.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from repository import LAYERS, ROOT, Package, packages, version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LAYER_MODULES = {f"flash_attn_{layer}" for layer in LAYERS}
IMPORTING_CALLS = {"import_module", "__import__", "importorskip", "find_spec"}


def main() -> int:
    problems = all_problems(ROOT)
    for problem in problems:
        print(problem)
    print(f"{len(problems)} problems" if problems else "layers, pins and licenses are in order")
    return 1 if problems else 0


def all_problems(root: Path) -> list[str]:
    problems: list[str] = []
    for package in packages(root):
        problems += import_problems(package)
        problems += metadata_problems(package, version(root))
        if (package.folder / "LICENSE").read_text() != (root / "LICENSE").read_text():
            problems.append(f"{package.folder / 'LICENSE'} differs from the repository's")
    return problems


def import_problems(package: Package) -> list[str]:
    allowed = {package.module} | ({package.below.module} if package.below else set())
    problems = []
    for path in sorted(package.folder.rglob("*.py")):
        if "build" in path.relative_to(package.folder).parts:
            continue
        for line, module in imported_layers(ast.parse(path.read_text(), filename=str(path))):
            if module not in allowed:
                expected = " and ".join(sorted(allowed))
                problems.append(f"{path}:{line}: imports {module}, may import {expected}")
    return problems


def imported_layers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, top-level module) of all that imports one of the four packages, by statement or by call."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and _called_name(node) in IMPORTING_CALLS:
            names = [
                a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)
            ]
        for name in names:
            top = name.partition(".")[0]
            if top in LAYER_MODULES or top == "flash_attn":
                yield getattr(node, "lineno", 0), top


def metadata_problems(package: Package, shared_version: str) -> list[str]:
    project: dict[str, Any] = tomllib.loads(package.pyproject.read_text())["project"]
    problems = []
    if project["version"] != shared_version:
        problems.append(f"{package.pyproject}: version {project['version']}, expected {shared_version}")
    if f'__version__ = "{shared_version}"' not in package.init_file.read_text().splitlines():
        problems.append(f'{package.init_file}: expected the line __version__ = "{shared_version}"')

    extras = project.get("optional-dependencies", {}).values()
    required = [Requirement(text) for text in project["dependencies"]]
    optional = [Requirement(text) for extra in extras for text in extra]
    pins = [str(pin) for pin in required if _is_layer(pin)]
    expected = [f"{package.below.distribution}=={shared_version}"] if package.below else []
    if pins != expected or any(_is_layer(requirement) for requirement in optional):
        problems.append(
            f"{package.pyproject}: layer requirements {pins}, expected {expected} and none in extras"
        )
    for requirement in (*required, *optional):
        operators = {specifier.operator for specifier in requirement.specifier}
        if not _is_layer(requirement) and (">=" not in operators or operators - {">=", "!="}):
            problems.append(f"{package.pyproject}: {requirement} needs a floor (>=) and no ceiling or pin")
    return problems


def _is_layer(requirement: Requirement) -> bool:
    return requirement.name in {f"flash-attn-{layer}" for layer in LAYERS}


def _called_name(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


if __name__ == "__main__":
    sys.exit(main())
