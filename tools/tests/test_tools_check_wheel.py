from __future__ import annotations

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from build_support.platform_tag import platform_tag
from check_wheel import LIBRARY, elf_problems, wheel_problems

PURE = "py3-none-any"


def make_wheel(
    folder: Path,
    module: str = "flash_attn_kernels",
    tag: str = PURE,
    library: Path | None = None,
    **files: str,
) -> Path:
    """A wheel of version 1.0; `files` adds files, with "" for one to leave out."""
    info = f"{module}-1.0.dist-info"
    contents = {
        f"{module}/__init__.py": "# code",
        f"{module}/py.typed": "# typed",
        f"{info}/licenses/LICENSE": "license",
        f"{info}/METADATA": "metadata",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: {str(library is None).lower()}\nTag: {tag}\n",
        **files,
    }
    path = folder / f"{module}-1.0-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in contents.items():
            if text:
                archive.writestr(name, text)
        if library:
            archive.write(library, LIBRARY)
    return path


def make_library(folder: Path, source: str, *flags: str) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    code, library = folder / "x.cpp", folder / "x.so"
    code.write_text(
        f'#include <cstdio>\nvoid prints() {{ std::puts(""); }}\n{source}'
    )  # so that it needs glibc
    subprocess.run(["g++", "-shared", "-fPIC", str(code), "-o", str(library), *flags], check=True)
    return library


def test_a_release_needs_the_library_and_a_test_install_does_not(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path)
    assert wheel_problems(wheel, "1.0", allow_pure=True) == []
    (problem,) = wheel_problems(wheel, "1.0")
    assert LIBRARY in problem and "FLASH_ATTN_KERNELS_BUILD=always" in problem
    assert wheel_problems(make_wheel(tmp_path, "flash_attn_ops"), "1.0") == []


def test_a_library_with_an_honest_tag_passes(tmp_path: Path) -> None:
    library = make_library(tmp_path, 'extern "C" void aoti_torch_x(); void f() { aoti_torch_x(); }')
    tag = f"py3-none-{platform_tag(library)}"
    assert wheel_problems(make_wheel(tmp_path, tag=tag, library=library), "1.0") == []


@pytest.mark.parametrize("tag", [PURE, "cp311-cp311-linux_x86_64", "py3-none-manylinux_2_99_x86_64"])
def test_a_dishonest_tag_is_found(tmp_path: Path, tag: str) -> None:
    library = make_library(tmp_path, "void f() {}")
    problems = wheel_problems(make_wheel(tmp_path, tag=tag, library=library), "1.0")
    assert any(
        f"tagged {tag}, but the library justifies py3-none-manylinux_2_" in problem for problem in problems
    )


def test_a_platform_tag_without_compiled_code_is_found(tmp_path: Path) -> None:
    tag = "py3-none-manylinux_2_34_x86_64"
    problems = wheel_problems(make_wheel(tmp_path, tag=tag), "1.0", allow_pure=True)
    assert any("holds no compiled code" in problem for problem in problems)


def test_compiled_code_belongs_in_the_kernels_alone(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, "flash_attn_ops", **{"flash_attn_ops/x.so": "code"})
    (problem,) = wheel_problems(wheel, "1.0")
    assert "flash_attn_ops/x.so" in problem


def test_wrong_contents_are_found(tmp_path: Path) -> None:
    files = {"flash_attn_models/py.typed": "", "tests/test_x.py": "# test"}
    problems = wheel_problems(make_wheel(tmp_path, "flash_attn_models", **files), "2.0")
    assert problems == [
        "version 1.0, expected 2.0",
        "flash_attn_models/py.typed is missing",
        "tests/test_x.py does not belong here",
    ]


def test_another_distribution_is_refused(tmp_path: Path) -> None:
    (problem,) = wheel_problems(make_wheel(tmp_path, "flash_attn"), "1.0")
    assert "not the name of a wheel of one of the four packages" in problem


def test_symbols_of_torchs_unstable_interface_are_found(tmp_path: Path) -> None:
    source = "namespace c10 { void unstable(); } void f() { c10::unstable(); }"
    (problem,) = elf_problems(make_library(tmp_path, source))
    assert "_ZN3c108unstableEv" in problem


def test_search_paths_and_foreign_libraries_are_found(tmp_path: Path) -> None:
    flags = ("-Wl,-rpath,/somewhere", "-Wl,--no-as-needed", "-lresolv")
    problems = elf_problems(make_library(tmp_path, "void f() {}", *flags))
    assert any("search path /somewhere" in problem for problem in problems)
    assert any("needs libresolv.so" in problem for problem in problems)
