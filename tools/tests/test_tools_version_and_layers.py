from __future__ import annotations

import ast
import shutil
from pathlib import Path

import bump_version
import check_layers
import pytest
from repository import ROOT, packages, version


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A repository with everything that states versions, licenses and imports."""
    shutil.copy(ROOT / "LICENSE", tmp_path / "LICENSE")
    for package in packages(tmp_path):
        package.init_file.parent.mkdir(parents=True)
        original = packages()[packages(tmp_path).index(package)]
        shutil.copy(original.pyproject, package.pyproject)
        shutil.copy(original.folder / "LICENSE", package.folder / "LICENSE")
        shutil.copy(original.init_file, package.init_file)
    return tmp_path


def test_this_repository_is_in_order() -> None:
    assert check_layers.all_problems(ROOT) == []


def test_bump_keeps_versions_and_pins_together(copy: Path) -> None:
    for path, text in bump_version.bumped_files(copy, "7.8.9").items():
        path.write_text(text)
    assert version(copy) == "7.8.9"
    assert check_layers.all_problems(copy) == []
    pins = [package.pyproject.read_text().count("==7.8.9") for package in packages(copy)]
    assert pins == [0, 1, 1, 1]


@pytest.mark.parametrize("wrong", ["", "next", "v1.2", "1.2-rc1"])
def test_bump_refuses_what_is_no_version(copy: Path, wrong: str) -> None:
    with pytest.raises(ValueError, match="expected a normalised PEP 440 version"):
        bump_version.bumped_files(copy, wrong)


def test_bump_refuses_a_file_that_disagrees(copy: Path) -> None:
    ops = packages(copy)[1]
    ops.init_file.write_text('__version__ = "0.0.1"\n')
    with pytest.raises(ValueError, match=r"flash_attn_ops.__init__\.py: expected exactly one line"):
        bump_version.bumped_files(copy, "7.8.9")


@pytest.mark.parametrize(
    ("layer", "file", "source", "module"),
    [
        (0, "src/flash_attn_kernels/a.py", "import flash_attn_ops", "flash_attn_ops"),
        (1, "tests/test_a.py", "from flash_attn_models.gpt import X", "flash_attn_models"),
        (
            2,
            "src/flash_attn_models/a.py",
            "def f():\n    from flash_attn_kernels import g",
            "flash_attn_kernels",
        ),
        (3, "tests/test_a.py", "pytest.importorskip('flash_attn_ops.norm')", "flash_attn_ops"),
        (3, "benchmarks/bench_a.py", "importlib.import_module('flash_attn_kernels')", "flash_attn_kernels"),
        (0, "src/flash_attn_kernels/a.py", "import flash_attn", "flash_attn"),
    ],
)
def test_forbidden_imports_are_found(copy: Path, layer: int, file: str, source: str, module: str) -> None:
    path = packages(copy)[layer].folder / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(source)
    (problem,) = check_layers.all_problems(copy)
    assert str(path) in problem
    assert f"imports {module}, may import" in problem


def test_allowed_imports_pass() -> None:
    source = "import flash_attn_ops.norm\nfrom flash_attn_kernels import x\nfrom .flash_attn_train import y"
    assert [name for _, name in check_layers.imported_layers(ast.parse(source))] == [
        "flash_attn_ops",
        "flash_attn_kernels",
    ]


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('"flash-attn-ops=={v}"', '"flash-attn-ops>={v}"', "layer requirements"),
        (
            '"flash-attn-ops=={v}"',
            '"flash-attn-ops=={v}",\n  "flash-attn-kernels=={v}"',
            "layer requirements",
        ),
        ('"torch>=2.11"', '"torch>=2.11,<3"', "no ceiling"),
        ('"torch>=2.11"', '"torch"', "needs a floor"),
        ('version = "{v}"', 'version = "9.9"', "version 9.9"),
    ],
)
def test_wrong_metadata_is_found(copy: Path, old: str, new: str, complaint: str) -> None:
    models = packages(copy)[2].pyproject
    shared = version(copy)
    text = models.read_text()
    assert old.format(v=shared) in text
    models.write_text(text.replace(old.format(v=shared), new.format(v=shared)))
    assert any(complaint in problem for problem in check_layers.all_problems(copy))
